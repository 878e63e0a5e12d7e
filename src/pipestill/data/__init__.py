"""Data for language models: records of text become examples, whose tokens count or not, and these become batches.

records   ps.data.JsonLines("train.jsonl"), TextFiles, HuggingFace, or any iterable of dicts
   |
   |  a tokenizer and its chat template                 -> which tokens are predicted, what is cut off (`Tokenization`)
   v
examples  ps.data.tokenize(...) in memory, or a ps.data.Stream
   |
   |  LengthSampler, ShuffledSampler, Packed            -> an order that follows from seed and epoch
   v
batches   DataLoader(..., collate_fn=PadCollator(...) or PackCollator(...))
          ({"input_ids", "attention_mask", "position_ids"}, {"labels", ...}); labels are shifted here
"""

from pipestill.data.collate import PackCollator, PadCollator
from pipestill.data.counted import Count, CountedMap
from pipestill.data.example import IGNORED, Example
from pipestill.data.orders import LengthSampler, Packed, ShuffledSampler, pack
from pipestill.data.records import HuggingFace, JsonLines, Record, TextFiles, open_records
from pipestill.data.stream import Stream
from pipestill.data.tokenize import Examples, Tokenization, tokenize

__all__ = [
    "IGNORED", "Count", "CountedMap", "Example", "Examples", "HuggingFace", "JsonLines", "LengthSampler", "PackCollator",
    "Packed", "PadCollator", "Record", "ShuffledSampler", "Stream", "TextFiles", "Tokenization", "open_records", "pack",
    "tokenize",
]  # fmt: skip
