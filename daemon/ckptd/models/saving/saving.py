"""`save_pretrained`: a model's configuration and weights into a folder, whole or not at all.

What `from_pretrained` loads, here and in transformers: config.json, generation_config.json for
models that generate, and weights as one safetensors file or as shards with an index.

The state of the folder. Nothing carries its final name before it is complete and durable. Into a
folder without weights of this variant, configuration goes first, then shard after shard, the index
last: until then it does not load. Into one that holds an earlier save, all new weights are written
under temporary names while the earlier ones still load; then those are removed, configuration and
weights get their names, the index last. A crash leaves the earlier save, the new one, or a folder
that does not load: never a mixture. Other variants, and files that are not of a save, stay, but for
those that describe the quantization of the weights that a dequantized model replaces.

Done better than the original: names that share memory are left out only where a reload restores
them (`shared_tensors`); no stale shard, index or single file stays; files are synced, and their
modes come from the umask; saving over the files a model was loaded from is safe; sizes may be
written `1GiB` or as plain numbers; a trailing slash does not empty the default `repo_id`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ckptd import units
from ckptd.checkpoint import writer
from ckptd.checkpoint.writer import ShardWriter
from ckptd.errors import NoSpace, StorageFailed
from ckptd.models import push
from ckptd.models.saving import (
    adapters,
    custom_code,
    name_order,
    saved_files,
    shared_tensors,
    weight_bytes,
    weight_plan,
)
from ckptd.models.saving.weight_plan import WeightPlan
from ckptd.plan import shards
from ckptd.quant import configuration

_log = logging.getLogger(__name__)

_PUSH_OPTIONS = (
    "repo_id",
    "commit_message",
    "commit_description",
    "private",
    "revision",
    "create_pr",
    "tags",
)


def save(
    model: Any,
    save_directory: str | os.PathLike[str],
    *,
    is_main_process: bool = True,
    state_dict: Mapping[str, Any] | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str | None = "50GB",
    variant: str | None = None,
    token: str | bool | None = None,
    save_peft_format: bool = True,
    save_original_format: bool = True,
    **kwargs: Any,
) -> None:
    """Save `model` to the folder `save_directory`, made when absent; see the module docstring.

    Sets `config.dtype` to that of the first floating parameter and `config.architectures` to the
    class (a model backed by a checkpoint keeps the checkpoint's). Blocks until everything is durable. Saving again replaces the earlier save.

    Args:
        model: a `PreTrainedModel`.
        save_directory: a path that is a file is logged as an error, and nothing is saved.
        is_main_process: False writes nothing.
        state_dict: saved in place of `model.state_dict()`.
        push_to_hub: also push exactly the files of this save, see `push_to_hub`.
        max_shard_size: the most tensor bytes of one file: `5GB`, `1GiB`, or a number; None is no
            limit. A larger tensor gets a file of its own.
        variant: part of the weights' names: `model.<variant>.safetensors`.
        token: for the push.
        save_peft_format: put `base_model.model.` before the names of an attached adapter.
        save_original_format: accepted as documented; names at run time are those of the files.
        **kwargs: for the push: repo_id (default the folder's name), commit_message,
            commit_description, private, revision, create_pr, tags. Ignored without one.

    Raises:
        ValueError: a size that is none, a dtype safetensors does not have, several active adapters,
            or a configuration that may not be saved.
        RuntimeError: a tensor without data, or whose bytes are not its values.
        TypeError: an unknown argument for the push.
        OSError: the file system refused; the text says what is needed, `errno` is ENOSPC where the
            disk is full.
        errors.HubError: the push failed; the files are saved.
    """
    del save_original_format
    folder = Path(save_directory)
    if folder.is_file():
        _log.error("%s is a file, not a folder: nothing was saved", folder)
        return
    limit = None if max_shard_size is None else units.parse_bytes(max_shard_size)
    _describe(model)
    if not is_main_process:
        return
    with contextlib.ExitStack() as stack:
        upload = None
        if push_to_hub:
            upload = stack.enter_context(_opened_push(model, folder, token, kwargs))
            stack.enter_context(saved_files.reported(upload.take))
        with _documented_errors():
            _save(
                model,
                folder,
                model.state_dict() if state_dict is None else state_dict,
                limit=limit,
                variant=variant,
                peft_format=save_peft_format,
            )
        if upload is not None:
            upload.commit()


@contextlib.contextmanager
def _documented_errors() -> Iterator[None]:
    """Turn the writer's refusals into the OSError that callers of transformers expect."""
    try:
        yield
    except NoSpace as error:
        raise OSError(errno.ENOSPC, str(error)) from error
    except StorageFailed as error:
        raise OSError(str(error)) from error


def _opened_push(
    model: Any, folder: Path, token: str | bool | None, options: Mapping[str, Any]
) -> contextlib.AbstractContextManager[push.Upload]:
    unknown = sorted(set(options) - set(_PUSH_OPTIONS))
    if unknown:
        raise TypeError(f"save_pretrained got unknown arguments for the push: {unknown}")
    given = dict(options) | {"repo_id": push.repo_id_of(folder, options)}
    return push.uploading(model, folder, token=token, **given)


def _save(
    model: Any,
    folder: Path,
    state: Mapping[str, Any],
    *,
    limit: int | None,
    variant: str | None,
    peft_format: bool,
) -> None:
    """Decide everything from names and memory, then write."""
    has_adapter = adapters.attached(model)
    if has_adapter:
        state = adapters.adapter_state(model, state, peft_format=peft_format)
        variant = None
    decision = shared_tensors.decide(model, _wanted(model, state))
    stem = adapters.STEM if has_adapter else "model"
    tensors = decision.tensors
    plan = weight_plan.plan(
        {name: tensors[name] for name in _order(model, tensors)},
        max_shard_bytes=limit if limit is not None else sum(t.nbytes for t in tensors.values()),
        total_parameters=model.num_parameters(),
        stem=stem,
        variant=variant,
    )
    with _untied(decision.untied):
        side = _side_files(model, has_adapter=has_adapter)
    writer.make_folder(folder)
    _remove_leftovers(folder, stem=stem, variant=variant)
    _Folder(folder, plan, side, stem=stem, variant=variant).write()
    if not has_adapter and getattr(model, "dequantized_from", None) is not None:
        _remove_descriptions(folder)


def _describe(model: Any) -> None:
    """Note in the configuration what is saved, as transformers notes it."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    is_stand_in = getattr(model, "_keeps_architectures", False)
    if not (is_stand_in and model.config.architectures):
        model.config.architectures = [type(model).__name__.removeprefix("FSDP")]


def _wanted(model: Any, state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors to be saved: without those the class leaves out, and without non-tensors."""
    patterns: Iterable[str] = getattr(model, "_keys_to_ignore_on_save", None) or ()
    ignored = [re.compile(pattern) for pattern in patterns]
    found = {}
    for name, tensor in state.items():
        if any(pattern.fullmatch(name) for pattern in ignored):
            continue
        if not isinstance(tensor, torch.Tensor):
            _log.warning("%s is a %s, not a tensor: left out", name, type(tensor).__name__)
            continue
        weight_plan.require_plain(name, tensor)
        found[name] = tensor.detach()
    return found


def _order(model: Any, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    return name_order.ordered(
        tensors,
        model_type=model.config.model_type,
        is_loaded=getattr(model, "_is_loaded_from_checkpoint", False),
    )


@contextlib.contextmanager
def _untied(configs: tuple[Any, ...]) -> Iterator[None]:
    """Let the tie flags of these configurations be False meanwhile: only the file shall say so."""
    every = [c for config in configs for c in (config, config.get_text_config())]
    before = [(config, config.tie_word_embeddings) for config in every]
    try:
        for config in every:
            config.tie_word_embeddings = False
        yield
    finally:
        for config, flag in reversed(before):
            config.tie_word_embeddings = flag


def _side_files(model: Any, *, has_adapter: bool) -> dict[str, bytes]:
    """Return what goes beside the weights; failures come before the folder is touched."""
    config = model.config
    code = custom_code.gather(config, config) | custom_code.gather(model, config)
    with tempfile.TemporaryDirectory(prefix="ckptd-save-") as name:
        if has_adapter:
            model.peft_config[adapters.active(model)].save_pretrained(name)
        else:
            model.config.save_pretrained(name)
        if model.can_generate() and getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(name)
        written = {path.name: path.read_bytes() for path in sorted(Path(name).iterdir())}
    return code | written


def _remove_leftovers(folder: Path, *, stem: str, variant: str | None) -> None:
    """Remove temporary files of a save of this variant that was killed."""
    for path in folder.glob(f"{writer.TEMPORARY_PREFIX}{stem}*"):
        name = path.name.removeprefix(writer.TEMPORARY_PREFIX)
        if shards.is_weight_name(name, stem=stem, variant=variant):
            path.unlink(missing_ok=True)


def _remove_descriptions(folder: Path) -> None:
    """Remove files that call the weights quantized, where a plain model took their place."""
    for name in configuration.SIDE_FILES:
        (folder / name).unlink(missing_ok=True)


class _Folder:
    """The one order in which files appear and disappear."""

    def __init__(
        self,
        path: Path,
        plan: WeightPlan,
        side: Mapping[str, bytes],
        *,
        stem: str,
        variant: str | None,
    ) -> None:
        self._path = path
        self._plan = plan
        self._side = side
        names = sorted(entry.name for entry in path.iterdir())
        self._earlier = [n for n in names if shards.is_weight_name(n, stem=stem, variant=variant)]
        self._index = path / plan.index_name
        self._single = shards.file_names(1, stem=stem, variant=variant)[0]

    def write(self) -> None:
        """Put everything in its place, durable.

        Raises:
            NoSpace, StorageFailed: the file system refused; no temporary file stays.
        """
        writer.require_space(self._path, self._plan.nbytes)
        if self._earlier:
            self._replace()
        else:
            self._fill()
        if self._plan.index is not None:
            writer.write_file(self._index, self._plan.index)
            saved_files.report(self._index)

    def _fill(self) -> None:
        """Write into a folder that has no weights: every file gets its name as soon as it is whole."""
        self._write_side()
        for shard in self._written():
            shard.finish()
            saved_files.report(shard.path)

    def _replace(self) -> None:
        """Write beside the earlier weights, then let the new ones take their place."""
        done: list[ShardWriter] = []
        try:
            for shard in self._written():
                done.append(shard)
                shard.sync()
            self._remove_earlier()
            self._write_side()
            for shard in done:
                shard.finish()
        except BaseException:
            for shard in done:
                shard.abandon()
            raise
        for shard in done:
            saved_files.report(shard.path)

    def _written(self) -> Iterator[ShardWriter]:
        """Yield a writer for each weight file, its bytes handed over but not yet synced."""
        uses_cuda = any(t.is_cuda for file in self._plan.files for _, t in file.tensors)
        buffers = weight_bytes.Buffers(pinned=uses_cuda)
        with ThreadPoolExecutor(weight_bytes.THREADS, "ckptd-save") as pool:
            for file in self._plan.files:
                shard = ShardWriter(self._path / file.name, nbytes=file.nbytes)
                shard.open()
                try:
                    weight_bytes.write(file, shard.fd, pool=pool, buffers=buffers)
                except BaseException as error:
                    pool.shutdown(cancel_futures=True)
                    shard.abandon()
                    if isinstance(error, OSError):
                        raise writer.translated(error, shard.path, shard.nbytes) from error
                    raise
                yield shard

    def _remove_earlier(self) -> None:
        """Remove the earlier weights, those first without which the folder does not load."""
        order = sorted(self._earlier, key=lambda name: name not in (self._index.name, self._single))
        try:
            for name in order:
                (self._path / name).unlink(missing_ok=True)
            writer.sync_folder(self._path)
        except OSError as error:
            raise writer.translated(error, self._path, 0) from error

    def _write_side(self) -> None:
        for name, content in self._side.items():
            writer.write_file(self._path / name, content)
            saved_files.report(self._path / name)
