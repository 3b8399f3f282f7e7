"""From data files to token batches: tokenizer, readers, encoding with loss masks, data sets, sampler."""

from rlhf_dist.data.datasets import PreferenceDataset, PromptDataset, SequenceDataset, Split
from rlhf_dist.data.encoding import Message, encode_conversation, encode_prompt, encode_text, stop_token_ids
from rlhf_dist.data.loading import load_pairs, load_preferences, load_prompts, load_sequences
from rlhf_dist.data.sampler import EpochSampler
from rlhf_dist.data.sft import SFTSets, load_sft
from rlhf_dist.data.store import DataReport
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
