"""A baseline that a reward model should beat: a linear score of the words of a response.

Logistic regression on the difference of two responses' TF-IDF vectors, without intercept, is the Bradley–Terry model with a
linear reward. scikit-learn comes with the extra `curation`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from rlhf_dist.algo.losses import ranked_pairs
from rlhf_dist.batches import PreferenceBatch
from rlhf_dist.data.datasets import PreferenceDataset
from rlhf_dist.errors import ConfigError


class BagOfWords:
    """Fitted on the training set of a reward model, to be held against it on the same held-out set."""

    def __init__(self, train: PreferenceDataset, decode: Callable[[Tensor], str], seed: int = 0) -> None:
        """`decode`: [n] token ids → text."""
        from scipy.sparse import vstack
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression

        self._decode = decode
        # One-letter words, too: "I" and "a" are words. Both cases as one, single words and pairs of words.
        self._vectorizer = TfidfVectorizer(
            ngram_range=(1, 2), min_df=2, sublinear_tf=True, token_pattern=r"(?u)\b\w+\b"
        )
        batch, lengths = _whole(train)
        texts = self._texts(batch, lengths)
        try:
            features = self._vectorizer.fit_transform(texts)
        except ValueError as error:
            raise ConfigError(
                f"the bag-of-words baseline finds no word that two training responses share ({error}); set "
                "reward.bag_of_words_baseline to false"
            ) from error
        row = torch.full(batch.present.shape, -1)
        row[batch.present] = torch.arange(len(texts))
        better, worse, weights = ranked_pairs(batch.present, batch.ranks)
        pairs = weights > 0
        first, second = row[:, better][pairs].numpy(), row[:, worse][pairs].numpy()
        difference = features[first] - features[second]
        weight = weights[pairs].double().numpy()
        # Both orders of each pair, so that neither class is the larger.
        self._model = LogisticRegression(fit_intercept=False, C=1.0, max_iter=1000, random_state=seed)
        self._model.fit(
            vstack([difference, -difference]), [1] * len(weight) + [0] * len(weight), sample_weight=[*weight, *weight]
        )

    def score(self, dataset: PreferenceDataset, indices: Tensor) -> Tensor:
        """[n, K] float64 scores of the records `indices` [n]; 0 where there is no response."""
        batch = dataset.batch(indices)
        texts = self._texts(batch, dataset.response_tokens(indices))
        found = torch.from_numpy(self._model.decision_function(self._vectorizer.transform(texts)))
        return torch.zeros(batch.lengths.shape, dtype=found.dtype).masked_scatter(batch.present, found)

    def _texts(self, batch: PreferenceBatch, response_tokens: Tensor) -> list[str]:
        """Of the responses that there are, in row-major order, without their prompts."""
        texts = []
        for tokens, length, own in zip(
            batch.tokens[batch.present], batch.lengths[batch.present], response_tokens[batch.present], strict=True
        ):
            texts.append(self._decode(tokens[int(length - own) : int(length)]))
        return texts


def check_baseline() -> None:
    """Refuse the baseline where scikit-learn is absent."""
    if find_spec("sklearn") is None:
        raise ConfigError(
            "reward.bag_of_words_baseline needs scikit-learn; pip install 'rlhf-dist[curation]', or set it to false"
        )


def _whole(dataset: PreferenceDataset) -> tuple[PreferenceBatch, Tensor]:
    indices = range(len(dataset))
    return dataset.batch(indices), dataset.response_tokens(indices)
