"""GenerationConfig: files both ways with transformers, precedence, validation, unknown keys."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError

from ckptd.models import push
from ckptd.models.generation import generation_config, generation_rules
from ckptd.models.generation.generation_config import GenerationConfig

RICH: dict[str, Any] = {
    "max_length": 64,
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 5,
    "top_p": 0.9,
    "repetition_penalty": 1.3,
    "eos_token_id": [2, 7],
    "bos_token_id": 1,
    "pad_token_id": 0,
    "num_return_sequences": 2,
    "house_made": {"a": [1, 2]},
}


def without_version(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in settings.items() if k != "transformers_version"}


@pytest.mark.parametrize("settings", [{}, RICH, {"min_new_tokens": 3, "use_cache": False}])
def test_transformers_reads_what_is_saved_here(tmp_path: Path, settings: dict[str, Any]) -> None:
    """A file saved here gives transformers the same settings, unknown ones included."""
    GenerationConfig(**settings).save_pretrained(tmp_path)
    read = transformers.GenerationConfig.from_pretrained(str(tmp_path))
    assert read == transformers.GenerationConfig(**settings)


@pytest.mark.parametrize("settings", [{}, RICH, {"decoder_start_token_id": 0}])
def test_reads_what_transformers_saves(tmp_path: Path, settings: dict[str, Any]) -> None:
    """A file saved by transformers gives the same settings here, and the same text back."""
    theirs = transformers.GenerationConfig(**settings)
    theirs.save_pretrained(str(tmp_path))
    before = (tmp_path / "generation_config.json").read_text()
    ours = GenerationConfig.from_pretrained(tmp_path)
    ours.save_pretrained(tmp_path / "again")
    assert ours == GenerationConfig(**settings)
    assert (tmp_path / "again" / "generation_config.json").read_text() == before


def test_has_the_settings_of_transformers() -> None:
    """Every setting that transformers knows reads here, with the same value when not given."""
    theirs = without_version(transformers.GenerationConfig().to_dict())
    theirs.pop("continuous_batching_config")  # deprecated there before it was ever in a file
    assert without_version(GenerationConfig().to_dict()) == theirs


@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(eos_token_id=[2, 3], pad_token_id=0),
        transformers.GPT2Config(),
        transformers.T5Config(decoder_start_token_id=0, output_hidden_states=True),
        transformers.Gemma3Config(text_config={"eos_token_id": 106}),
    ],
    ids=lambda config: config.model_type,
)
@pytest.mark.parametrize("as_dict", [False, True])
def test_from_a_model_config_as_transformers(
    config: transformers.PreTrainedConfig, as_dict: bool
) -> None:
    """The settings found in a model's configuration are those that transformers finds."""
    theirs = transformers.GenerationConfig.from_model_config(
        config.to_dict() if as_dict else config
    )
    ours = GenerationConfig.from_model_config(config.to_dict() if as_dict else config)
    assert without_version(ours.to_diff_dict()) == without_version(theirs.to_diff_dict())


def test_update_returns_what_is_no_setting() -> None:
    """`update` sets what exists and returns the rest."""
    config = GenerationConfig(top_k=3)
    assert config.update(top_k=4, attention_mask="mask") == {"attention_mask": "mask"}
    assert config.top_k == 4


def test_update_of_defaults_keeps_what_was_given() -> None:
    """`defaults_only` fills None and nothing else; new names need `allow_custom_entries`."""
    config = GenerationConfig(top_k=3)
    config.update(defaults_only=True, allow_custom_entries=True, top_k=9, max_length=7, own=1)
    assert (config.top_k, config.max_length, config.to_dict()["own"]) == (3, 7, 1)


def test_from_dict_gives_back_unused_arguments() -> None:
    """With `return_unused_kwargs`, arguments that name no setting come back and are not kept."""
    config, unused = GenerationConfig.from_dict(
        {"top_k": 1, "own": 2}, own=3, top_k=5, do_sample=True, foo=1, return_unused_kwargs=True
    )
    assert unused == {"foo": 1}
    assert without_version(config.to_diff_dict()) == {"do_sample": True, "own": 3, "top_k": 5}


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"num_return_sequences": 3}, "num_return_sequences"),
        ({"num_return_sequences": 3, "num_beams": 2}, "num_beams"),
        ({"early_stopping": "maybe"}, "early_stopping"),
        ({"streamer": object()}, "streamer"),
        ({"suppress_tokens": [1, 2], "forced_eos_token_id": [2]}, "forced_eos_token_id"),
    ],
)
def test_refuses_the_impossible_as_transformers(settings: dict[str, Any], names: str) -> None:
    """What transformers refuses at once is refused here, and the text names the setting."""
    with pytest.raises(ValueError):
        transformers.GenerationConfig(**settings)
    with pytest.raises(ValueError, match=names):
        GenerationConfig(**settings)


def test_saving_settings_without_effect_is_refused(tmp_path: Path) -> None:
    """A changed configuration whose settings have no effect is not written."""
    config = GenerationConfig(temperature=0.5)
    with pytest.raises(ValueError, match=r"temperature.*do_sample"):
        config.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_published_file_can_always_be_saved_back(tmp_path: Path) -> None:
    """Settings that were read and not changed are written back even where one has no effect."""
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5}')
    GenerationConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == {"temperature": 0.5}


def test_settings_without_effect_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """The same idle settings are named in the log the first time only."""
    generation_config.warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            GenerationConfig(top_p=0.35)
    assert [record.getMessage() for record in caplog.records] == [
        "generation settings without effect: top_p=0.35 is used only with do_sample=True"
    ]


def test_turning_sampling_off_does_not_complain_about_the_model(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A call's do_sample=False says nothing about the temperature of the model's file."""
    generation_config.warn_once.cache_clear()
    config = GenerationConfig(do_sample=True, temperature=0.21)
    with caplog.at_level(logging.WARNING):
        config.update(do_sample=False)
    assert not caplog.records


def test_no_file_is_an_os_error(tmp_path: Path) -> None:
    """A folder without the file is an OSError that names the path."""
    with pytest.raises(OSError, match=r"generation_config\.json"):
        GenerationConfig.from_pretrained(tmp_path)


def test_broken_json_is_an_os_error(tmp_path: Path) -> None:
    """A file that is no JSON object is an OSError that names the path."""
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(OSError, match=r"generation_config\.json is not a valid JSON"):
        GenerationConfig.from_pretrained(tmp_path)


def test_hub_id_goes_through_the_cache_of_huggingface_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Hub id is asked of `hf_hub_download` with the caller's cache, revision and token."""
    asked: dict[str, Any] = {}
    GenerationConfig(top_k=3, do_sample=True).save_pretrained(tmp_path)

    def download(repo_id: str, filename: str, **kwargs: Any) -> str:
        asked.update(kwargs, repo_id=repo_id)
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    config = GenerationConfig.from_pretrained("org/model", revision="refs/pr/1", token="t")
    assert (config.top_k, asked["repo_id"], asked["revision"]) == (3, "org/model", "refs/pr/1")


def test_unreachable_hub_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What huggingface_hub cannot find or reach is an OSError."""

    def download(*args: Any, **kwargs: Any) -> str:
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(OSError, match="org/model"):
        GenerationConfig.from_pretrained("org/model", local_files_only=True)


def test_pushing_a_file_goes_through_the_one_way_to_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`push_to_hub=True` hands the written file and the options to `push.push_files`."""
    pushed: list[Any] = []
    monkeypatch.setattr(push, "push_files", lambda _, paths, **kw: pushed.append((paths, kw)))
    GenerationConfig().save_pretrained(tmp_path, push_to_hub=True, repo_id="org/model")
    assert pushed == [([tmp_path / "generation_config.json"], {"repo_id": "org/model"})]


def test_copies_are_equal_and_metadata_does_not_count() -> None:
    """Equality and hash look at the settings, not at where they came from."""
    ours = GenerationConfig.from_model_config({"eos_token_id": 2})
    other = GenerationConfig(eos_token_id=2, transformers_version="5.0.0")
    assert ours == other
    assert hash(ours) == hash(other)
    assert ours != GenerationConfig(eos_token_id=3)


@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 4}, {"stop_strings": ["a"]}, {"do_sample": True, "typical_p": 0.3}],
)
def test_what_is_not_served_is_named(settings: dict[str, Any]) -> None:
    """A setting that `generate` does not follow is refused with what it does follow."""
    with pytest.raises(ValueError, match=rf"{list(settings)[-1]}.*greedy decoding and sampling"):
        generation_rules.require_served(settings)


def test_neutral_values_are_served() -> None:
    """The defaults of transformers ask nothing that is not served."""
    generation_rules.require_served(
        transformers.GenerationConfig()._get_default_generation_params()
    )
