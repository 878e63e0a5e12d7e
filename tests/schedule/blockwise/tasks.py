"""What tests of blockwise training share: random profiles, portions and schedules."""

from fractions import Fraction
from itertools import pairwise

from hypothesis import strategies as st

from pipestill.costs import Link
from pipestill.schedule import Schedule
from pipestill.schedule.blockwise.generate import Group, Portion, alone, sliced, staged
from pipestill.schedule.blockwise.profile import BlockProfile, BlockTimes
from pipestill.schedule.blockwise.structure import BlockwiseCosts

amounts = st.sampled_from([0.0, 1.0]) | st.integers(1, 5000).map(lambda thousandths: thousandths / 1000)
num_bytes = st.integers(0, 50)
links = st.builds(Link, st.sampled_from([0.0, 0.25]), st.sampled_from([1.0, 64.0, float("inf")]))

_TWELFTHS = 12


def line(teacher: float, student: float, parameters: int = 0, inputs: int = 0) -> BlockTimes:
    """A block whose seconds are proportional to rows."""
    return BlockTimes("block", (1,), (teacher,), (student,), inputs, parameters)


@st.composite
def profiles(draw: st.DrawFn, num_blocks: st.SearchStrategy[int] | None = None, memory: bool = False) -> BlockProfile:
    """Blocks with one or several points, more rows of which may even take less time; work and bytes may be nothing."""
    rows = tuple(draw(st.sampled_from([(8,), (1, 32), (2, 4, 16)])))

    def block(index: int) -> BlockTimes:
        seconds = [tuple(draw(amounts) for _ in rows) for _ in range(2)]
        return BlockTimes(f"{index}", rows, *seconds, *(draw(num_bytes) for _ in range(5 if memory else 2)))

    return BlockProfile(tuple(map(block, range(draw(st.integers(1, 6) if num_blocks is None else num_blocks)))), draw(links))


@st.composite
def block_times(draw: st.DrawFn) -> BlockTimes:
    """Any measured times of a block."""
    rows = sorted(draw(st.sets(st.integers(1, 512), min_size=1, max_size=4)))
    seconds = st.lists(st.floats(0.0, 1e6), min_size=len(rows), max_size=len(rows)).map(tuple)
    name = draw(st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=6))
    return BlockTimes(
        name,
        tuple(rows),
        draw(seconds),
        draw(seconds),
        *(draw(st.integers(0, 10**12)) for _ in range(5)),
        draw(st.floats(0.0, 1e6)),
    )


@st.composite
def costs_of(draw: st.DrawFn, schedule: Schedule) -> BlockwiseCosts:
    """Of a schedule's blocks, for batches that its ranks do or do not share evenly."""
    structure = schedule.structure
    profile = draw(profiles(st.just(len(structure.teacher))))
    speeds = st.tuples(*[st.sampled_from([0.5, 1.0, 3.0])] * structure.num_ranks)
    return BlockwiseCosts(profile, draw(st.integers(1, 40)), draw(st.just(()) | speeds))


@st.composite
def groups(draw: st.DrawFn) -> list[Group]:
    """A partition of blocks into stages, and groups of ranks for them."""
    num_blocks, found, first, rank = draw(st.integers(1, 5)), list[Group](), 0, 0
    while first < num_blocks:
        end, size = draw(st.integers(first + 1, num_blocks)), draw(st.integers(1, 3))
        found.append((range(first, end), tuple(range(rank, rank + size))))
        first, rank = end, rank + size
    return found


@st.composite
def portions(draw: st.DrawFn, num_ranks: int, batches: range) -> list[Portion]:
    """A block's: whole on one rank, by batches (a rank may come twice), by rows, or one way first and another then."""
    ranks = st.integers(0, num_ranks - 1)
    way = draw(st.sampled_from(["whole", "batches", "rows", "both"]))
    if way == "both" and len(batches) > 1:
        cut = draw(st.integers(batches.start + 1, batches.stop - 1))
        halves = range(batches.start, cut), range(cut, batches.stop)
        return [p for half in halves for p in draw(portions(num_ranks, half))]
    if way == "batches":
        cuts = sorted({batches.start, *draw(st.sets(st.sampled_from(batches), max_size=3)), batches.stop})
        return [Portion(draw(ranks), range(*ends)) for ends in pairwise(cuts)]
    if way == "rows":
        sharers = draw(st.lists(ranks, min_size=1, unique=True))
        inner = st.lists(st.integers(1, _TWELFTHS - 1), min_size=len(sharers) - 1, max_size=len(sharers) - 1, unique=True)
        edges = [Fraction(edge, _TWELFTHS) for edge in (0, *sorted(draw(inner)), _TWELFTHS)]
        return [Portion(rank, batches, part) for rank, part in zip(sharers, pairwise(edges), strict=True)]
    return [Portion(draw(ranks), batches)]


@st.composite
def sliced_schedules(draw: st.DrawFn, most_blocks: int = 4, most_ranks: int = 4, most_batches: int = 4) -> Schedule:
    """Any portions of any blocks, whoever runs the teacher's; each rank has something to do."""
    num_ranks, window = draw(st.integers(1, most_ranks)), draw(st.integers(1, most_batches))
    num_blocks = draw(st.integers(-(-num_ranks // 2), max(most_blocks, num_ranks)))
    each = portions(num_ranks, range(window))
    teacher, student = ([draw(each) for _ in range(num_blocks)] for _ in range(2))
    used = sorted({p.rank for block in (*teacher, *student) for p in block})
    teacher, student = (
        [[Portion(used.index(p.rank), p.batches, p.part) for p in block] for block in blocks] for blocks in (teacher, student)
    )
    return sliced(window, teacher, student, len(used), teacher_first=draw(st.booleans()))


block_schedules = (
    st.builds(staged, st.just("hybrid"), groups(), barrier=st.booleans())
    | st.builds(alone, st.just("dp"), st.integers(0, 3), st.integers(1, 4))
    | sliced_schedules()
)
"""Everything that this project makes of blocks that train alone, and more."""

RELAY = [(range(1), (0,)), (range(1, 2), (1,)), (range(2, 4), (2,))]

HYBRID = [(range(1), (0, 1)), (range(1, 3), (2,))]


def half_a_block_moves(teacher_first: bool) -> Schedule:
    """Block 0 is rank 0's. Block 1 is rank 1's for batch 0 and rank 0's for batch 1; block 2 is rank 1's."""
    whole = range(2)
    teacher = [[Portion(0, whole)], [Portion(1, whole)], [Portion(1, whole)]]
    student = [[Portion(0, whole)], [Portion(0, range(1, 2)), Portion(1, range(1))], [Portion(1, whole)]]
    return sliced(2, teacher, student, 2, teacher_first=teacher_first)
