"""Sources → records → token ids and loss masks → batches.

    file, directory, hub name ─ files.py ─▶ rows ─ reader.py, kinds.py ─▶ records ─ splits.py ─▶ train | held-out records
    records ─ tokenization.py, encoding.py ─▶ tokens on disk ─ datasets.py ─▶ batches, in the order of sampler.py, mixing.py

`loading.py` does all of it for a run. Invalid rows: `bad_rows.py`.
"""

from rlhf_dist.data.bad_rows import DataReport
from rlhf_dist.data.datasets import (
    PreferenceDataset,
    PromptDataset,
    SequenceDataset,
    Split,
)
from rlhf_dist.data.encoding import Message, encode_conversation, encode_prompt, encode_text, stop_token_ids
from rlhf_dist.data.loading import SFTSets, load_pairs, load_preferences, load_prompts, load_sequences, load_sft
from rlhf_dist.data.sampler import EpochSampler
from rlhf_dist.data.tokenizer import load_tokenizer

__all__ = [
    "DataReport",
    "EpochSampler",
    "Message",
    "PreferenceDataset",
    "PromptDataset",
    "SFTSets",
    "SequenceDataset",
    "Split",
    "encode_conversation",
    "encode_prompt",
    "encode_text",
    "load_pairs",
    "load_preferences",
    "load_prompts",
    "load_sequences",
    "load_sft",
    "load_tokenizer",
    "stop_token_ids",
]
