"""How long each action and each transfer of a pipeline takes, from the costs of its stages."""

from __future__ import annotations

from pipestill.costs import StageCosts
from pipestill.schedule.action import Action, Op, Role
from pipestill.schedule.pipeline.step import PipelineStep


def action_seconds(action: Action, structure: PipelineStep, costs: StageCosts) -> float:
    """How long `action` computes when no other rank disturbs it."""
    if action.op is Op.DATA:
        return costs.data
    if action.op is Op.LOSS:
        return costs.loss * structure.num_microbatches / structure.num_losses / structure.pieces
    if action.op is Op.UPDATE:
        return costs.update[action.stage]
    if action.op is Op.EMA:
        return costs.ema[action.stage] if costs.ema else 0.0
    if action.op is Op.NORM:
        return 0.0
    weight = costs.weight[action.stage] if costs.weight else 0.0
    if action.op is Op.FORWARD:
        seconds = (costs.forward if action.role is Role.STUDENT else costs.teacher)[action.stage]
    elif action.op is Op.WEIGHT:
        seconds = weight
    else:
        seconds = costs.backward[action.stage] - (weight if action.op is Op.INPUT else 0.0)
    return seconds * unit_scale(action, structure, costs)


def transfer_seconds(action: Action, structure: PipelineStep, costs: StageCosts) -> float:
    """How long the result of `action` takes to arrive at another rank: a boundary's activations or their gradients."""
    return costs.link.seconds(result_bytes(action, structure, costs))


def result_bytes(action: Action, structure: PipelineStep, costs: StageCosts) -> float:
    """Bytes of what a forward gives to the stage behind it, or a backward to the one before; 0 for other work."""
    if action.microbatch is None:
        return 0
    if action.op is Op.FORWARD:
        sizes, boundary = costs.activation_bytes if action.role is Role.STUDENT else costs.teacher_bytes, action.stage
    else:
        sizes, boundary = costs.activation_bytes, action.stage - 1
    return sizes[boundary] * unit_scale(action, structure, costs) if sizes and boundary >= 0 else 0


def unit_scale(action: Action, structure: PipelineStep, costs: StageCosts) -> float:
    """The factor on the costs' seconds and bytes for a forward or backward of this unit.

    The costs are those of a microbatch of full size in a view that costs 1.
    """
    assert action.microbatch is not None
    return costs.views[action.microbatch % structure.views_of(action.role)] / structure.pieces
