"""Does the data belong to the vocabulary? One look at the token files before a run, by one process of each machine."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from modellink.config.schema import Config
from modellink.data.indexed import check_vocabulary
from modellink.data.tokenizer import Tokenizer


class _Feed(Protocol):
    config: Config
    tokenizer: Tokenizer | None
    train: Any
    valid: Any
    test: Any


F = TypeVar("F", bound=_Feed)


def with_known_ids(feed: F) -> F:
    """Return `feed`; raises ModelLinkError when its token files hold ids that its vocabulary does not have.

    The vocabulary is the tokenizer's where there is one: a larger id may still have a row, but that row is padding.
    """
    model, options = feed.config.model, feed.config.tokenizer
    size = model.vocab_size or model.padded_vocab_size
    if feed.tokenizer is not None:
        size = feed.tokenizer.vocab_size + options.vocab_extra_ids
    assert size is not None, "the model has been built"
    loaders = (loader for loader in (feed.train, feed.valid, feed.test) if loader is not None)
    check_vocabulary((loader.dataset for loader in loaders), size)
    return feed
