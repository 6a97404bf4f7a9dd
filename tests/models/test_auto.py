"""The auto classes and the registry: the class that fits a checkpoint, and clear refusals."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers

from ckptd.models import auto, registry
from ckptd.models.config.config import PreTrainedConfig

AUTO_CLASSES = [getattr(auto, name) for name in registry.AUTO_CLASSES]
ENTRIES = sorted(
    {*registry.CONFIGS.values(), *(e for table in registry.MODELS.values() for e in table.values())}
)


def write(folder: Path, content: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content), "utf-8")
    return folder


class MineConfig(PreTrainedConfig):
    model_type = "mine"
    width: int = 3


class Loaded:
    """A model class that records how it was made."""

    config_class: ClassVar[Any] = MineConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Loaded:
        return cls(*args, **kwargs)

    @classmethod
    def _from_config(cls, *args: Any, **kwargs: Any) -> Loaded:
        return cls(*args, **kwargs)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every test register what it wants, and forget it afterwards."""
    monkeypatch.setattr(auto, "_registered_configs", {})
    for cls in AUTO_CLASSES:
        monkeypatch.setattr(cls, "_registered", {})


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    auto.AutoConfig.register("mine", MineConfig)
    return write(tmp_path / "mine", {"model_type": "mine", "width": 5})


class TestRegistry:
    @pytest.mark.parametrize("entry", ENTRIES, ids=[f"{m.split('.')[-1]}.{c}" for m, c in ENTRIES])
    def test_every_entry_is_a_class(self, entry: registry.Entry) -> None:
        """Every class that the registry names exists, under its own name."""
        assert registry.imported(entry).__name__ == entry[1]

    @pytest.mark.parametrize("model_type", registry.CONFIGS)
    def test_every_architecture_is_whole(self, model_type: str) -> None:
        """A configuration has its model type, and each of its models names it as its own."""
        config_class = registry.imported(registry.CONFIGS[model_type])
        assert config_class.model_type == model_type
        assert model_type in registry.MODELS["base"]
        for table in registry.MODELS.values():
            if model_type in table:
                assert registry.imported(table[model_type]).config_class is config_class

    @pytest.mark.parametrize("model_type", registry.CONFIGS)
    def test_every_default_is_that_of_transformers(self, model_type: str) -> None:
        """A configuration that nobody filled is the one transformers has, key by key."""
        ours = registry.imported(registry.CONFIGS[model_type])()
        theirs = transformers.AutoConfig.for_model(model_type)
        private = {key for key in theirs.to_dict() if key.startswith("_")}
        expected = {k: v for k, v in theirs.to_dict().items() if k not in private}
        found = {k: v for k, v in ours.to_dict().items() if k not in private}
        assert found == expected
        assert type(ours).attribute_map == type(theirs).attribute_map

    def test_names_are_those_of_transformers(self) -> None:
        """Each head's table says what transformers' says, so that code finds the same class."""
        for name, head in registry.AUTO_CLASSES.items():
            theirs = getattr(transformers, name)._model_mapping._model_mapping
            native = {kind: theirs[kind] for kind in registry.CONFIGS if kind in theirs}
            ours = {kind: entry[1] for kind, entry in registry.MODELS[head].items()}
            assert ours == native, name

    def test_no_auto_class_is_left_out(self) -> None:
        """Each auto class of transformers is known, and here where an architecture runs with it."""
        for name in dir(transformers):
            if not name.startswith("AutoModel"):
                continue
            assert auto.check_auto_class(name) == name
            theirs = getattr(transformers, name)._model_mapping._model_mapping
            found = {kind: theirs[kind] for kind in registry.CONFIGS if kind in theirs}
            # A single model of an architecture that is not here, listed under another's name.
            if name != "AutoModelForDecision":
                assert (name in registry.AUTO_CLASSES) is bool(found), name

    def test_a_missing_class_is_named(self) -> None:
        """An entry without its class, or module, fails with both names."""
        with pytest.raises(ImportError, match=r"ckptd\.units has no class Nothing"):
            registry.imported(("ckptd.units", "Nothing"))

    def test_auto_classes_are_known_by_name_and_class(self) -> None:
        """Every auto class can be registered for, by name or as the class; others cannot."""
        assert auto.check_auto_class("AutoModelForCausalLM") == "AutoModelForCausalLM"
        assert auto.check_auto_class(auto.AutoModel) == "AutoModel"
        assert auto.check_auto_class("AutoModelForImageTextToText")
        with pytest.raises(ValueError, match="AutoModelForNothing is not an auto class"):
            auto.check_auto_class("AutoModelForNothing")

    def test_naming_architectures_imports_none(self) -> None:
        """Importing the auto classes imports neither torch nor any architecture."""
        code = (
            "import sys, ckptd.models.auto;"
            "assert 'torch' not in sys.modules;"
            "assert not [m for m in sys.modules if m.startswith('ckptd.models.native')]"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


class TestAutoConfig:
    @pytest.mark.parametrize("model_type", registry.CONFIGS)
    def test_it_reads_what_transformers_saved(self, tmp_path: Path, model_type: str) -> None:
        """A config.json saved by transformers gives our class with the same values, and back."""
        theirs = transformers.AutoConfig.for_model(model_type, num_labels=3, dtype="float16")
        theirs.save_pretrained(tmp_path / "theirs")
        ours = auto.AutoConfig.from_pretrained(tmp_path / "theirs")
        assert type(ours).__name__ == type(theirs).__name__
        ours.save_pretrained(tmp_path / "ours")
        again = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
        assert type(again) is type(theirs)
        expected = transformers.AutoConfig.from_pretrained(tmp_path / "theirs").to_dict()
        assert {**again.to_dict(), "_name_or_path": ""} == {**expected, "_name_or_path": ""}

    def test_an_unknown_type_keeps_every_key(self, tmp_path: Path) -> None:
        """An architecture that has no class here gives a generic configuration with all keys."""
        write(tmp_path, {"model_type": "strange", "size": 3, "decoder": {"vocab_size": 9}})
        config = auto.AutoConfig.from_pretrained(tmp_path)
        assert type(config) is PreTrainedConfig
        assert (config.model_type, config.size, config.name_or_path) == (
            "strange",
            3,
            str(tmp_path),
        )
        assert config.get_text_config().vocab_size == 9

    @pytest.mark.parametrize("content", [{}, {"model_type": ""}, {"model_type": None, "a": 1}])
    def test_no_type_is_refused(self, tmp_path: Path, content: dict[str, Any]) -> None:
        """A config.json without model_type is refused with its folder and the key."""
        write(tmp_path, content)
        with pytest.raises(ValueError, match="model_type") as caught:
            auto.AutoConfig.from_pretrained(tmp_path)
        assert str(tmp_path) in str(caught.value)

    def test_a_missing_file_is_an_oserror(self, tmp_path: Path) -> None:
        """A folder without config.json is refused as the configuration class refuses it."""
        with pytest.raises(OSError, match=r"config\.json"):
            auto.AutoConfig.from_pretrained(tmp_path)

    def test_arguments_override_and_the_rest_comes_back(self, mine: Path) -> None:
        """Values override the file; what names none comes back where it is asked for."""
        config, unused = auto.AutoConfig.from_pretrained(
            mine, width=7, other=1, trust_remote_code=True, return_unused_kwargs=True
        )
        assert (type(config), config.width, unused) == (MineConfig, 7, {"other": 1})

    def test_a_type_gives_its_class(self) -> None:
        """`for_model` builds by model type and refuses one that has no class."""
        auto.AutoConfig.register("mine", MineConfig)
        assert auto.AutoConfig.for_model("mine", width=9).width == 9
        with pytest.raises(ValueError, match="strange"):
            auto.AutoConfig.for_model("strange")

    def test_a_native_type_is_not_replaced_unasked(self) -> None:
        """Types of this package and types that disagree are refused; `exist_ok` replaces."""

        class Other(MineConfig):
            model_type = "llama"

        with pytest.raises(ValueError, match="taken"):
            auto.AutoConfig.register("llama", Other)
        auto.AutoConfig.register("llama", Other, exist_ok=True)
        with pytest.raises(ValueError, match="'mine', expected 'other'"):
            auto.AutoConfig.register("other", MineConfig)

    def test_ministral_is_not_taken_for_mistral(self, tmp_path: Path) -> None:
        """A mistral file whose layers differ is another architecture, as transformers reads it."""
        write(tmp_path, {"model_type": "mistral", "layer_types": ["full_attention"]})
        assert auto.AutoConfig.from_pretrained(tmp_path).model_type == "ministral"

    def test_a_nested_one_is_found_by_its_type(self) -> None:
        """A composite may leave the class of a part to the part's model_type."""

        class Whole(PreTrainedConfig):
            model_type = "whole"
            sub_configs: ClassVar[dict[str, Any]] = {"text_config": auto.AutoConfig}

        auto.AutoConfig.register("mine", MineConfig)
        whole = Whole(text_config={"model_type": "mine", "width": 4})
        assert type(whole.text_config) is MineConfig
        assert Whole(**whole.to_diff_dict()) == whole
        assert Whole().text_config is None


class TestAutoModel:
    @pytest.mark.parametrize("cls", [auto.AutoConfig, *AUTO_CLASSES])
    def test_there_are_no_instances(self, cls: type) -> None:
        """Calling an auto class says what to call instead."""
        with pytest.raises(OSError, match="from_pretrained"):
            cls()

    @pytest.mark.parametrize("cls", AUTO_CLASSES)
    def test_the_registered_class_loads(self, mine: Path, cls: Any) -> None:
        """Arguments split: values go to the configuration, all others to the model."""
        cls.register(MineConfig, Loaded)
        model = cls.from_pretrained(
            mine, 1, width=8, dtype="auto", attn_implementation="eager", device="cpu", revision="x"
        )
        config = model.kwargs.pop("config")
        assert (config.width, config._attn_implementation) == (8, "eager")
        assert config.name_or_path == str(mine)
        assert model.args == (mine, 1)
        assert model.kwargs == {"dtype": "auto", "device": "cpu", "revision": "x"}

    def test_a_given_configuration_is_used(self, mine: Path) -> None:
        """A configuration that is given is not read again; a path to one is read."""
        auto.AutoModel.register(MineConfig, Loaded)
        config = MineConfig(width=11)
        model = auto.AutoModel.from_pretrained("nowhere/at-all", config=config, width=5)
        assert model.kwargs == {"config": config, "width": 5}
        model = auto.AutoModel.from_pretrained("nowhere/at-all", config=str(mine))
        assert model.kwargs["config"].width == 5

    def test_from_config_hands_on_its_arguments(self) -> None:
        """A fresh model gets the configuration, dtype and attention that were asked for."""
        auto.AutoModel.register(MineConfig, Loaded)
        config = MineConfig()
        model = auto.AutoModel.from_config(config, dtype="float16", attn_implementation="eager")
        assert model.args == (config,)
        assert model.kwargs == {"dtype": "float16", "attn_implementation": "eager"}

    @pytest.mark.parametrize("cls", AUTO_CLASSES)
    def test_an_unknown_type_is_backed_by_its_checkpoint(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cls: Any
    ) -> None:
        """Any other architecture gives the checkpoint-backed model, whatever the head."""
        module = types.ModuleType("ckptd.models.backed")
        module.BackedModel = Loaded  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "ckptd.models.backed", module)
        write(tmp_path, {"model_type": "strange"})
        model = cls.from_pretrained(tmp_path, dtype=torch.float16)
        assert type(model) is Loaded
        assert model.kwargs["config"].model_type == "strange"
        with pytest.raises(ValueError, match="strange"):
            cls.from_config(model.kwargs["config"])

    def test_a_head_that_an_architecture_lacks_is_refused(self, mine: Path) -> None:
        """A known architecture without the head is refused, with those that have it."""
        with pytest.raises(
            ValueError, match=r"AutoModelForMaskedLM has no class for MineConfig.*bert"
        ):
            auto.AutoModelForMaskedLM.from_pretrained(mine)

    def test_registering_again_replaces(self) -> None:
        """What users registered may be registered again, as when a cell is run twice."""
        for _ in range(2):
            auto.AutoConfig.register("mine", MineConfig)
            auto.AutoModel.register(MineConfig, Loaded)
        assert type(auto.AutoModel.from_config(MineConfig())) is Loaded

    def test_a_native_model_is_not_replaced_unasked(self) -> None:
        """A configuration of this package and one that the model does not name are refused."""
        native = auto.AutoConfig.for_model("llama").__class__
        with pytest.raises(ValueError, match="exist_ok"):
            auto.AutoModel.register(native, type("Other", (Loaded,), {"config_class": native}))
        with pytest.raises(ValueError, match="MineConfig, expected PreTrainedConfig"):
            auto.AutoModel.register(PreTrainedConfig, Loaded)

    def test_the_text_part_of_a_composite_can_be_the_model(self) -> None:
        """A model class of the text configuration gets that part of a composite."""

        class Whole(PreTrainedConfig):
            model_type = "whole"
            sub_configs: ClassVar[dict[str, Any]] = {"text_config": MineConfig}

        class Text(Loaded):
            config_class = MineConfig

        auto.AutoModel._registered[Whole] = Text
        whole = Whole(text_config={"width": 4})
        assert auto.AutoModel.from_config(whole).args == (whole.text_config,)
