"""A baseline that a reward model should beat: a linear score of the words of a response.

Logistic regression on the difference of two responses' TF-IDF vectors, without intercept, is the Bradley–Terry model with a
linear reward. scikit-learn comes with the extra `curation`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_dist.core.errors import ConfigError
from rlhf_dist.core.random import permutation
from rlhf_dist.core.rankings import PairWeights, weighted_pairs
from rlhf_dist.data.datasets import PreferenceDataset

_STRENGTHS = (0.1, 1.0, 10.0, 100.0)
"""Inverse strengths of the L2 penalty that are tried."""
_CHUNK = 512
"""Records that are decoded at once."""


class BagOfWords:
    """Fitted on the training set of a reward model, as a baseline on the same held-out set.

    Pairs weigh what they weigh for the reward model: those of a prompt as much as one, each times its pair weight. The
    strength of the penalty is the one that does best on a fifth of the training prompts.
    """

    def __init__(
        self,
        train: PreferenceDataset,
        decode: Callable[[Tensor], str],
        pair_weights: PairWeights | None = None,
        seed: int = 0,
    ) -> None:
        """`decode`: [n] token ids → text; `pair_weights`: those of the reward model's training.

        Raises:
            ConfigError: scikit-learn is absent, or no word is in two training responses.
        """
        if find_spec("sklearn") is None:
            raise ConfigError(
                "reward.bag_of_words_baseline needs scikit-learn; pip install 'rlhf-dist[curation]', or set it to false"
            )
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._decode = decode
        # Words of one letter, too: "I" and "a" are words. Both cases as one, single words and pairs of words.
        self._vectorizer = TfidfVectorizer(
            ngram_range=(1, 2), min_df=2, sublinear_tf=True, token_pattern=r"(?u)\b\w+\b"
        )
        texts, first, second, prompt, weight = self._pairs(train, pair_weights)
        try:
            features = self._vectorizer.fit_transform(texts)
        except ValueError as error:
            raise ConfigError(
                f"the bag-of-words baseline finds no word that two training responses share ({error}); set "
                "reward.bag_of_words_baseline to false"
            ) from error
        difference: Any = features[first] - features[second]
        order = permutation(seed, "bag of words", 0, len(train)).numpy()
        held_out = np.isin(prompt, order[: len(train) // 5])
        self.strength = 1.0
        """C, the inverse strength of the penalty."""
        if held_out.any() and not held_out.all():
            own = ~held_out
            losses = []
            for strength in _STRENGTHS:
                model = _fitted(difference[own], weight[own], strength)
                scores = model.decision_function(difference[held_out])
                losses.append(float(np.average(np.logaddexp(0, -scores), weights=weight[held_out])))
            self.strength = _STRENGTHS[int(np.argmin(losses))]
        self._model = _fitted(difference, weight, self.strength)

    def score(self, dataset: PreferenceDataset, indices: Tensor) -> Tensor:
        """[n, K] float64 scores of the records `indices` [n]; 0 where there is no response."""
        texts, present = self._texts(dataset, indices)
        found = torch.from_numpy(self._model.decision_function(self._vectorizer.transform(texts)))
        return torch.zeros(present.shape, dtype=found.dtype).masked_scatter(present, found)

    def _pairs(self, train: PreferenceDataset, pair_weights: PairWeights | None) -> tuple[Any, ...]:
        """All texts, and of each pair: rows of the better and the worse text, its prompt and its weight."""
        texts: list[str] = []
        columns: list[list[Any]] = [[], [], [], []]
        for indices in torch.arange(len(train)).split(_CHUNK):
            batch = train.batch(indices)
            better, worse, weights = weighted_pairs(batch, pair_weights)
            pairs = weights > 0
            new, present = self._texts(train, indices)
            row = torch.full(present.shape, -1)
            row[present] = torch.arange(len(texts), len(texts) + len(new))
            texts += new
            values = (row[:, better], row[:, worse], indices[:, None].expand_as(pairs), weights)
            for column, value in zip(columns, values, strict=True):
                column.append(value[pairs].numpy())
        return (texts, *(np.concatenate(column) for column in columns))

    def _texts(self, dataset: PreferenceDataset, indices: Tensor) -> tuple[list[str], Tensor]:
        """The responses that there are, in row-major order and without their prompts, and [n, K] where they are."""
        batch, own = dataset.batch(indices), dataset.response_tokens(indices)
        rows = zip(batch.tokens[batch.present], batch.lengths[batch.present], own[batch.present], strict=True)
        return [self._decode(tokens[int(end - length) : int(end)]) for tokens, end, length in rows], batch.present


def _fitted(difference: Any, weight: Any, strength: float) -> Any:
    """A model of both orders of each pair, so that neither class is the larger."""
    from scipy.sparse import vstack
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(fit_intercept=False, C=strength, max_iter=1000)
    labels = np.concatenate([np.ones(len(weight)), np.zeros(len(weight))])
    rows = vstack([difference, -difference]).tocsr()
    return model.fit(rows, labels, sample_weight=np.concatenate([weight, weight]))
