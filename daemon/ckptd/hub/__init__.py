"""Publishing: everything between finished files on disk and one commit on the Hub.

`publisher` does a push, `push` holds its values, `card` and `ledger` are pure, `landing` makes the
one commit and `pull_request` keeps the one pull request. `client`, `session` and `translate` are
the adapter: the only modules that import huggingface_hub, at module level, because that library
reads its environment while it is imported. Nothing here knows a tensor, a job or the daemon, so
that `PreTrainedModel.push_to_hub` can use the same publisher. `local` is the loopback Hub.
"""
