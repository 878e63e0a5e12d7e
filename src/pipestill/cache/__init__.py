"""A teacher's largest logits on disk: written once, read by any number of students without the teacher.

writing   ps.cache.keyed(dataset)  -> targets with keys of samples
          with ps.cache.Writer(folder, teacher, tokenizer) as writer:
              ps.Distillation(teacher, student, loss=ps.cache.Recorded(loss, writer)), or ps.cache.fill(writer, teacher, loader)
reading   ps.cache.TeacherCache(folder, tokenizer=tokenizer).attach(dataset)
          -> targets for ps.Supervised(student, ps.losses.CachedTopK())
"""

from pipestill.cache.datasets import keyed
from pipestill.cache.fingerprint import teacher_hash, tokenizer_hash
from pipestill.cache.recorded import Recorded, fill
from pipestill.cache.store import TeacherCache
from pipestill.cache.writer import Writer

__all__ = ["Recorded", "TeacherCache", "Writer", "fill", "keyed", "teacher_hash", "tokenizer_hash"]
