"""`push_to_hub`: anything with `save_pretrained` to the Hub, in one commit.

The files go through the daemon's publisher: shards are sent while later ones are written, the
commit names its parent and is found again when its answer is lost, weight files of earlier pushes
are deleted in it, and the Hub's tree is compared with what was sent.

Done better than the original: tags are merged into the card of the revision that is pushed to (not
of main), whose text is kept; `model_tags` is not changed by a push; a short `repo_id` is completed
with the account's name.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptd.models.saving import saved_files

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

    from ckptd.hub.blocking import BlockingPublisher
    from ckptd.hub.push import HubEvent, LocalFile, Publication, Target

_log = logging.getLogger(__name__)

_KINDS = {
    "Model": "model",
    "Config": "config",
    "Tokenizer": "tokenizer",
    "FeatureExtractor": "feature extractor",
    "Processor": "processor",
}
"""Part of a class name -> what the default commit message calls it."""


class PushToHubMixin:
    """Adds `push_to_hub` to a class that has `save_pretrained`."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: list[str] | str | None = None,
    ) -> CommitInfo:
        """Save to a temporary folder and upload all of it in one commit, while it is written.

        Args:
            repo_id: `namespace/name`, or a name in your own namespace; made when absent.
            commit_message: default "Upload model", "Upload tokenizer"... by the class's name.
            commit_description: the commit's further text.
            private: visibility of a repo that is made now; ignored when it exists.
            token: None and True take HF_TOKEN or the stored login.
            revision: a branch, made from main when absent, or `refs/pr/N`.
            create_pr: open a pull request against main instead of committing.
            max_shard_size: see `save_pretrained`; ignored by objects without weights.
            tags: for the model card, after those of `add_model_tags`; one text counts as one tag.

        Returns:
            The commit; itself a str, its URL. Where the revision held exactly these files already
            no commit is made, and the one that holds them is returned.

        Raises:
            errors.HubError: what the Hub refused, or could not be reached for; nothing is published.
            NotImplementedError: the class has no `save_pretrained`.
        """
        save = getattr(self, "save_pretrained", None)
        if save is None:
            raise NotImplementedError(f"{type(self).__name__} needs save_pretrained to be pushed")
        options = {"max_shard_size": max_shard_size} if _takes(save, "max_shard_size") else {}
        with (
            tempfile.TemporaryDirectory(prefix="ckptd-push-") as name,
            uploading(
                self,
                Path(name),
                repo_id=repo_id,
                commit_message=commit_message,
                commit_description=commit_description,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                tags=tags,
            ) as upload,
        ):
            with saved_files.reported(upload.take):
                save(name, **options)
            upload.take_rest(card=True)
            return upload.commit()


class Upload:
    """Files of one folder on their way to one commit."""

    def __init__(self, folder: Path, publisher: BlockingPublisher) -> None:
        self._folder = folder
        self._publisher = publisher
        self._seen: dict[Path, LocalFile | None] = {}

    def take(self, path: Path) -> None:
        """Take a finished file along; weights are sent at once, others with the commit.

        Raises:
            errors.HubError: an earlier upload has failed for good.
        """
        self._seen[path] = None
        if path.suffix == ".safetensors":
            self._seen[path] = file = self._local(path)
            self._publisher.upload(file)

    def take_rest(self, *, card: bool) -> None:
        """Take along every other file of the folder, and a short card for a repo without one."""
        readme = self._folder / "README.md"
        if card and not readme.exists():
            title = self._publisher.target.repo_id.rpartition("/")[2]
            readme.write_text(f"---\nlibrary_name: transformers\n---\n\n# {title}\n", "utf-8")
        for path in sorted(self._folder.rglob("*")):
            if path.is_file() and path not in self._seen:
                self.take(path)

    def commit(self) -> CommitInfo:
        """Make the commit, wait until it is verified, and return it."""
        waiting = [self._local(path) for path, file in self._seen.items() if file is None]
        return self._info(self._publisher.commit(*waiting))

    def _local(self, path: Path) -> LocalFile:
        from ckptd.hub.push import LocalFile

        name = path.relative_to(self._folder).as_posix()
        return LocalFile(path=path, path_in_repo=name, nbytes=path.stat().st_size)

    def _info(self, made: Publication) -> CommitInfo:
        from huggingface_hub import CommitInfo

        from ckptd.hub import push

        target = self._publisher.target
        return CommitInfo(
            commit_url=made.commit_url,
            commit_message=push.title(target),
            commit_description=target.commit_description or "",
            oid=made.commit,
            _endpoint=self._publisher.endpoint,
            pr_url=made.pr_url,
        )


@contextlib.contextmanager
def uploading(
    pushed: object,
    folder: Path,
    *,
    repo_id: str,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | str | None = None,
) -> Iterator[Upload]:
    """Open a push of files in `folder`; leaving it with an exception cancels the push.

    Arguments as of `push_to_hub`; `pushed` gives the default message and its `model_tags`.

    Raises:
        errors.HubError: token, repo, revision or card stand in the way; nothing was sent.
    """
    # The Hub's client costs some tenths of a second: only those who push wait for it.
    from ckptd.hub.blocking import BlockingPublisher
    from ckptd.hub.push import Target

    target: Target = Target(
        repo_id=repo_id,
        revision=revision,
        create_pr=create_pr,
        private=private,
        commit_message=commit_message or default_message(type(pushed).__name__),
        commit_description=commit_description,
        card_tags=merged_tags(getattr(pushed, "model_tags", None), tags),
    )
    publisher = BlockingPublisher(
        target=target, push_id=uuid.uuid4().hex, token=_text(token), report=_tell
    )
    with publisher as opened:
        yield Upload(folder, opened)


def push_files(pushed: object, paths: Iterable[Path], **options: Any) -> CommitInfo:
    """Push exactly the files at `paths`, all in one folder, in one commit.

    Args:
        pushed: gives the default message and its `model_tags`.
        paths: files that nobody writes any more.
        **options: those of `push_to_hub` but for `max_shard_size`; `repo_id` defaults to the
            folder's name.

    Raises:
        errors.HubError: see `push_to_hub`.
        TypeError: an unknown option.
    """
    files = list(paths)
    folder = files[0].parent
    given = options | {"repo_id": repo_id_of(folder, options)}
    with uploading(pushed, folder, **given) as upload:
        for path in files:
            upload.take(path)
        return upload.commit()


def default_message(class_name: str) -> str:
    """Return the commit message for an object of this class: "Upload model"."""
    kinds = (kind for part, kind in _KINDS.items() if part in class_name)
    return f"Upload {next(kinds, class_name)}"


def merged_tags(*given: Iterable[str] | str | None) -> tuple[str, ...]:
    """Return all tags in order, none twice; a single text is one tag."""
    lists = [[tags] if isinstance(tags, str) else list(tags or ()) for tags in given]
    return tuple(dict.fromkeys(tag for tags in lists for tag in tags))


def repo_id_of(folder: Path, options: Mapping[str, Any]) -> str:
    """Return the repo to push `folder` to: the one asked for, else the folder's own name."""
    return str(options.get("repo_id") or folder.resolve().name)


def _tell(event: HubEvent) -> None:
    """Log what somebody who waits for a push wants to know; progress is not logged."""
    if event.text:
        _log.info("%s: %s", event.happening.value.replace("_", " "), event.text)


def _text(token: bool | str | None) -> str | None:
    """Return the token itself; None stands for the stored one.

    Raises:
        ValueError: False, which asks for no token: nothing can be pushed without one.
    """
    if token is False:
        raise ValueError("a push needs a token: pass one, or True for the stored login")
    return token if isinstance(token, str) else None


def _takes(function: Any, name: str) -> bool:
    parameters = inspect.signature(function).parameters
    return name in parameters or any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()
    )
