"""Comparing what was sent with what a tree holds."""

from __future__ import annotations

import hashlib
import subprocess

import pytest

from ckptd.hub import ledger

CONTENT = b'{"a": 1}\n'
SHA = hashlib.sha256(CONTENT).hexdigest()


def record(path: str = "x", *, large: bool = False) -> ledger.Record:
    return ledger.Record(
        path_in_repo=path, nbytes=len(CONTENT), sha256=SHA, content=None if large else CONTENT
    )


def remote(path: str = "x", *, large: bool = False, **changes: object) -> ledger.RemoteFile:
    fields = {
        "path_in_repo": path,
        "nbytes": len(CONTENT),
        "blob_id": "pointer" if large else ledger.git_blob_id(CONTENT),
        "sha256": SHA if large else None,
    }
    return ledger.RemoteFile(**{**fields, **changes})


def test_blob_ids_are_gits() -> None:
    """The id is the one that git itself computes."""
    done = subprocess.run(
        ["git", "hash-object", "--stdin"], input=CONTENT, capture_output=True, check=True
    )
    assert ledger.git_blob_id(CONTENT) == done.stdout.decode().strip()


@pytest.mark.parametrize("large", [False, True])
def test_equal_content_is_equal(large: bool) -> None:
    """A file that arrived as sent has no difference, in either kind of storage."""
    assert ledger.difference(record(large=large), remote(large=large)) is None


@pytest.mark.parametrize(
    ("large", "found", "text"),
    [
        (True, None, "is not there"),
        (True, remote(large=True, nbytes=1), "has 1 bytes, 9 were sent"),
        (True, remote(large=True, sha256="0" * 64), "has sha256 000"),
        (True, remote(), "not in large-file storage"),
        (False, remote(blob_id="0" * 40), "has git blob 000"),
        (False, remote(large=True, sha256="0" * 64), "has sha256 000"),
    ],
)
def test_each_difference_is_named(large: bool, found: ledger.RemoteFile | None, text: str) -> None:
    """Absence, size, sha256, storage and blob id: each has its own words."""
    assert text in (ledger.difference(record(large=large), found) or "")


STANDARD = [
    "model.safetensors",
    "model-00001-of-00009.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model-00002-of-00002.bin",
    "pytorch_model.bin.index.json",
]
FOREIGN = [
    "model.fp16.safetensors",
    "model.fp16-00001-of-00002.safetensors",
    "model.safetensors.index.fp16.json",
    "adapter_model.safetensors",
    "consolidated.safetensors",
    "tf_model.h5",
    "model-q4.gguf",
    "my_model.safetensors",
    "onnx/model.safetensors",
    "config.json",
]


def test_only_standard_weights_beside_the_new_ones_are_stale() -> None:
    """What would be loaded with or instead of the push goes; everything else stays."""
    tree = {path: remote(path) for path in STANDARD + FOREIGN}
    pushed = [record("model-00001-of-00002.safetensors", large=True)]
    assert ledger.stale_weights(pushed, tree) == sorted(STANDARD)


def test_shards_of_a_component_go_when_it_has_fewer() -> None:
    """In the folder of a pipeline's component, and in no other."""
    names = [
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    tree = {path: remote(path) for path in names}
    pushed = [record("unet/diffusion_pytorch_model.safetensors", large=True)]
    assert ledger.stale_weights(pushed, tree) == names[:2]


def test_a_push_without_weights_deletes_nothing() -> None:
    """Files without weights never take weights away."""
    tree = {path: remote(path) for path in STANDARD}
    assert ledger.stale_weights([record("config.json")], tree) == []
