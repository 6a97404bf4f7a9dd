"""Pushing a model: one commit on a real loopback Hub, files sent while later ones are written."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants, snapshot_download
from starlette.requests import Request

from ckptd import errors
from ckptd.hub.blocking import BlockingPublisher
from ckptd.hub.local.traffic import Fault
from ckptd.models import push
from ckptd.models.native import llama
from ckptd.models.saving import saved_files, saving

REPO = "acme/tiny"
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class PushedModel(transformers.LlamaForCausalLM, push.PushToHubMixin):  # type: ignore[misc]
    """A real model whose saving and pushing are ours."""

    model_tags: list[str] | None = None
    push_to_hub = push.PushToHubMixin.push_to_hub

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:
        saving.save(self, save_directory, **options)


class WordTokenizer(push.PushToHubMixin):
    """Something that is no model: it saves one file, and takes no options."""

    def save_pretrained(self, save_directory: str) -> None:
        (Path(save_directory) / "vocab.json").write_text('{"a": 0}')


def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    made = PushedModel(transformers.LlamaConfig(**SIZES)).eval()
    made.__class__.__name__ = "LlamaForCausalLM"
    return made


@dataclass
class Bench:
    """The Hub, a look at it, and what goes wrong on it."""

    hub: Any
    api: HfApi
    seen: list[tuple[str, str]] = field(default_factory=list)

    @property
    def token(self) -> str:
        return str(self.hub.token)

    def paths(self, revision: str = "main") -> set[str]:
        tree = self.api.list_repo_tree(REPO, recursive=True, revision=revision)
        return {item.path for item in tree} - {".gitattributes"}

    def titles(self, revision: str = "main") -> list[str]:
        return [item.title for item in self.api.list_repo_commits(REPO, revision=revision)]

    def download(self, revision: str = "main") -> Path:
        return Path(
            snapshot_download(REPO, revision=revision, token=self.token, endpoint=self.hub.url)
        )

    def card(self, revision: str = "main") -> str:
        return (self.download(revision) / "README.md").read_text()

    def put(self, **contents: bytes) -> None:
        self.api.create_repo(REPO, exist_ok=True)
        files = [CommitOperationAdd(n.replace("__", "."), data) for n, data in contents.items()]
        self.api.create_commit(REPO, files, commit_message="theirs")

    def fail(self, method: str, path: str, fault: Fault, *, times: int = 1) -> None:
        left = [times]

        def hook(request: Request) -> Fault | None:
            if request.method == method and path in request.url.path and left[0]:
                left[0] -= 1
                return fault
            return None

        self.hub.faults = hook

    def count(self, method: str, path: str) -> int:
        return len(self.hub.ledger.find(method, path))


@pytest.fixture
def bench(hub: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    torch.set_num_threads(1)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield Bench(hub=hub, api=HfApi(endpoint=hub.url, token=hub.token))
    transformers.logging.set_verbosity(verbosity)


def test_a_push_is_one_commit_that_transformers_loads(bench: Bench) -> None:
    """Config, shards and index in one commit; what is loaded from there equals the model."""
    pushed = model()
    info = pushed.push_to_hub(REPO, token=bench.token, max_shard_size="40KB")
    assert isinstance(info, CommitInfo)
    assert info.oid == bench.api.repo_info(REPO).sha
    assert info == info.commit_url == f"{bench.hub.url}/{REPO}/commit/{info.oid}"
    assert info.repo_url.repo_id == REPO
    assert (info.pr_url, info.pr_num) == (None, None)
    assert bench.titles().count("Upload LlamaForCausalLM") == 1
    assert {"config.json", "generation_config.json", "model.safetensors.index.json"} < bench.paths()
    loaded, report = transformers.LlamaForCausalLM.from_pretrained(
        bench.download(), output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in pushed.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_a_native_model_is_pushed_with_its_tags(bench: Bench) -> None:
    """`add_model_tags`, then `push_to_hub`: the card has them, and transformers loads the repo."""
    native = llama.LlamaForCausalLM(llama.LlamaConfig(**SIZES))
    native.add_model_tags("ours")
    native.push_to_hub(REPO, token=bench.token, max_shard_size="40KB", tags=["ours", "new"])
    assert "tags:\n- ours\n- new\n---" in bench.card()
    loaded, report = transformers.LlamaForCausalLM.from_pretrained(
        bench.download(), output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in native.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_shards_go_up_while_later_ones_are_written(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last shard is not written before the first one has arrived at the Hub."""
    arrived = threading.Event()
    pushed = model()

    def hook(request: Request) -> None:
        if request.method == "PUT":
            arrived.set()

    bench.hub.faults = hook
    real = saved_files.report

    def slow(path: Path) -> None:
        real(path)
        if path.name.startswith("model-00001"):
            assert arrived.wait(20)

    monkeypatch.setattr(saved_files, "report", slow)
    pushed.push_to_hub(REPO, token=bench.token, max_shard_size="40KB")
    assert arrived.is_set()


def test_positional_options_are_refused() -> None:
    """Only the repo may stand without its name."""
    with pytest.raises(TypeError):
        model().push_to_hub(REPO, "a message")


def test_everything_of_the_commit_may_be_said(bench: Bench) -> None:
    """Message, description, visibility, branch and tags arrive."""
    info = model().push_to_hub(
        REPO,
        commit_message="first try",
        commit_description="why so",
        private=True,
        token=bench.token,
        revision="step-1",
        tags=["a", "b"],
    )
    assert (info.commit_message, info.commit_description) == ("first try", "why so")
    assert bench.api.repo_info(REPO).private is True
    assert "first try" in bench.titles("step-1")
    assert "first try" not in bench.titles()
    assert "model.safetensors" in bench.paths("step-1")
    assert bench.card("step-1").startswith(
        "---\nlibrary_name: transformers\ntags:\n- a\n- b\n---\n"
    )


def test_tags_join_those_of_the_model_and_of_the_card(bench: Bench) -> None:
    """`model_tags`, then new ones, none twice, a text is one tag; card text and model stay."""
    bench.put(README__md=b"---\ntags:\n- theirs\n- mine\n---\n# Their text\n")
    pushed = model()
    pushed.model_tags = ["mine", "more"]
    pushed.push_to_hub(REPO, token=bench.token, tags="more than one word")
    card = bench.card()
    assert card.endswith("# Their text\n")
    assert "- theirs\n- mine\n- more\n- 'more than one word'\n" in card
    assert pushed.model_tags == ["mine", "more"]


def test_the_card_is_that_of_the_revision(bench: Bench) -> None:
    """A branch's card is merged, not main's."""
    bench.put(README__md=b"---\nlicense: mit\n---\n# main\n")
    bench.api.create_branch(REPO, branch="side")
    file = CommitOperationAdd("README.md", b"---\nlicense: mit\n---\n# side\n")
    bench.api.create_commit(REPO, [file], commit_message="their card", revision="side")
    model().push_to_hub(REPO, token=bench.token, revision="side", tags=["t"])
    assert bench.card("side").endswith("# side\n")
    assert bench.card() == "---\nlicense: mit\n---\n# main\n"


def test_a_model_without_tags_gets_a_short_card(bench: Bench) -> None:
    """A repo without a card gets one that names the library; an existing one is not touched."""
    model().push_to_hub(REPO, token=bench.token)
    assert bench.card() == "---\nlibrary_name: transformers\n---\n\n# tiny\n"


def test_a_pull_request_leaves_main_alone(bench: Bench) -> None:
    """`create_pr` opens one, and the commit's info names it."""
    bench.put(notes__txt=b"hello")
    info = model().push_to_hub(REPO, token=bench.token, create_pr=True)
    assert info.pr_num == 1
    assert info.pr_revision == "refs/pr/1"
    assert "model.safetensors" in bench.paths("refs/pr/1")
    assert "model.safetensors" not in bench.paths()
    again = model(1).push_to_hub(REPO, token=bench.token, revision="refs/pr/1")
    assert bench.titles("refs/pr/1")[0] == "Upload LlamaForCausalLM"
    assert again.oid != info.oid


def test_stale_weights_on_the_hub_go_in_the_same_commit(bench: Bench) -> None:
    """Shards, then one file: no shard and no index of the first push is left."""
    model().push_to_hub(REPO, token=bench.token, max_shard_size="40KB")
    before = bench.count("POST", "/commit/")
    model(1).push_to_hub(REPO, token=bench.token)
    weights = {path for path in bench.paths() if path.startswith("model")}
    assert weights == {"model.safetensors"}
    assert bench.count("POST", "/commit/") == before + 1


def test_a_lost_answer_is_no_second_commit(bench: Bench) -> None:
    """The commit landed and the connection broke: it is found, not made again."""
    bench.put(notes__txt=b"hello")
    bench.fail("POST", "/commit/", Fault.LOSE_ANSWER)
    info = model().push_to_hub(REPO, token=bench.token)
    assert bench.titles().count("Upload LlamaForCausalLM") == 1
    assert bench.api.repo_info(REPO).sha == info.oid


def test_the_same_files_again_make_no_commit(bench: Bench) -> None:
    """A revision that holds exactly these files is left as it is."""
    first = model().push_to_hub(REPO, token=bench.token)
    again = model().push_to_hub(REPO, token=bench.token)
    assert again.oid == first.oid
    assert bench.titles().count("Upload LlamaForCausalLM") == 1


def test_a_short_name_is_completed(bench: Bench) -> None:
    """A repo without a namespace is the account's own."""
    info = model().push_to_hub("mine", token=bench.token)
    assert info.repo_url.repo_id == "ckptd/mine"


def test_private_is_ignored_for_a_repo_that_exists(bench: Bench) -> None:
    """As documented: visibility belongs to the making of a repo."""
    bench.put(notes__txt=b"hello")
    model().push_to_hub(REPO, token=bench.token, private=True)
    assert bench.api.repo_info(REPO).private is False


def test_objects_without_weights_are_pushed_too(bench: Bench) -> None:
    """A tokenizer whose `save_pretrained` takes a folder only, beside the model's files."""
    model().push_to_hub(REPO, token=bench.token)
    info = WordTokenizer().push_to_hub(REPO, token=bench.token)
    assert info.commit_message == "Upload tokenizer"
    assert {"vocab.json", "model.safetensors"} < bench.paths()


def test_an_upload_that_fails_for_good_stops_the_push(bench: Bench) -> None:
    """A token that may only read is refused before anything is saved or made."""
    reader = next(t for t, who in bench.hub.accounts.items() if who.role == "read")
    with pytest.raises(errors.HubForbidden):
        model().push_to_hub(REPO, token=reader)
    assert not bench.api.repo_exists(REPO)


def test_a_failing_save_commits_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error between two shards: no commit, and the error is the caller's to see."""
    pushed = model()
    upload = BlockingPublisher.upload

    def awaited(self: Any, file: Any) -> None:
        upload(self, file)
        self._uploads[file].result()  # or its thread would still be busy when the Hub is gone

    monkeypatch.setattr(BlockingPublisher, "upload", awaited)
    real = saved_files.report

    def failing(path: Path) -> None:
        real(path)
        if path.name.startswith("model-00002"):
            raise KeyError(path.name)

    monkeypatch.setattr(saved_files, "report", failing)
    with pytest.raises(KeyError):
        pushed.push_to_hub(REPO, token=bench.token, max_shard_size="40KB")
    assert bench.count("POST", "/commit/") == 0


def test_false_is_no_token(bench: Bench) -> None:
    """Asking for no token cannot work, and says so."""
    with pytest.raises(ValueError, match="needs a token"):
        model().push_to_hub(REPO, token=False)


def test_save_pretrained_pushes_what_it_saved(bench: Bench, tmp_path: Path) -> None:
    """Exactly the files of this save, from the folder's own, with message, branch and tags."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "optimizer.pt").write_bytes(b"not for the Hub")
    made = model()
    made.save_pretrained(
        folder,
        push_to_hub=True,
        repo_id=REPO,
        token=bench.token,
        commit_message="saved",
        revision="side",
        tags=["t"],
        max_shard_size="40KB",
    )
    saved = {path.name for path in folder.iterdir()} - {"optimizer.pt"}
    assert bench.paths("side") == saved | {"README.md"}
    assert bench.titles("side")[0] == "saved"
    made.save_pretrained(folder, push_to_hub=True, repo_id=REPO, token=bench.token, revision="side")
    assert bench.paths("side") - {"README.md"} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }


def test_the_folder_names_the_repo(bench: Bench, tmp_path: Path) -> None:
    """Without a repo_id it is the folder's name, also with a slash at the end."""
    model().save_pretrained(f"{tmp_path}/named/", push_to_hub=True, token=bench.token)
    assert bench.api.repo_exists("ckptd/named")


def test_unknown_push_arguments_are_refused(tmp_path: Path) -> None:
    """A misspelt argument is a TypeError before anything is written."""
    with pytest.raises(TypeError, match="comit_message"):
        model().save_pretrained(tmp_path / "new", push_to_hub=True, comit_message="x")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("MyModel", "Upload model"),
        ("BertConfig", "Upload config"),
        ("BertTokenizerFast", "Upload tokenizer"),
        ("WhisperFeatureExtractor", "Upload feature extractor"),
        ("CLIPProcessor", "Upload processor"),
        ("BertForMaskedLM", "Upload BertForMaskedLM"),
    ],
)
def test_default_messages_are_those_of_transformers(name: str, message: str) -> None:
    """By the class's name."""
    assert push.default_message(name) == message


def test_the_index_of_a_push_names_its_shards(bench: Bench) -> None:
    """Every shard that the index names is on the Hub, and no other."""
    model().push_to_hub(REPO, token=bench.token, max_shard_size="40KB")
    index = json.loads((bench.download() / "model.safetensors.index.json").read_text())
    shards = {path for path in bench.paths() if path.startswith("model-")}
    assert set(index["weight_map"].values()) == shards
