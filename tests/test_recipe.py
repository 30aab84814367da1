"""Hydra's grammar to NeMo-Run's, on toy classes (no NeMo): what comes out, and what is said when it can't."""

from datetime import timedelta
from pathlib import Path

import fiddle as fdl
import nemo_run as run
import pytest
import recipe_toys as toys
import torch
from omegaconf import OmegaConf

from vlmsft.errors import UserError
from vlmsft.recipe import Translator, finetune_recipe, schema_of, translate


def everything(**values):
    return fdl.build(translate({"_target_": "recipe_toys.Everything", **values})).arguments


def problems_of(node):
    """{key: problem} of a whole config; its children are translated as finetune_recipe does."""
    cfg = OmegaConf.create(node)
    translator = Translator()
    for key in cfg:
        translator.child(cfg, key)
    with pytest.raises(UserError) as error:
        translator.raise_problems()
    return {problem.where: problem for problem in error.value.problems}


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_target_partial_and_object():
    assert translate({"_target_": "recipe_toys.Inner", "width": 3}) == run.Config(toys.Inner, width=3)
    assert translate({"_target_": "recipe_toys.task", "_partial_": True}) == run.Partial(toys.task)
    assert translate({"a": {"_target_": "recipe_toys.double", "_call_": False}}) == {"a": toys.double}
    assert translate({"a": {"_target_": "torch.bfloat16", "_call_": False}}) == {"a": torch.bfloat16}


@pytest.mark.parametrize(
    ("key", "written", "read"),
    [
        ("real", 1, 1.0),
        ("text", 12345, "12345"),
        ("either", 1, 1),
        ("either", 1.0, 1.0),
        ("either", None, None),
        ("word", "post", "post"),
        ("numeral", 32, "32"),
        ("dtype", "bf16", torch.bfloat16),
        ("dtype", "torch.float16", torch.float16),
        ("mode", "SAFE", toys.Mode.SAFE),
        ("mode", "safe", toys.Mode.SAFE),
        ("path", "/x/y", Path("/x/y")),
        ("text_or_path", "/x/y", "/x/y"),
        ("pair", [3, 4], (3, 4)),
        ("many", [1, 2.5, 3], (1.0, 2.5, 3.0)),
        ("names", ["a"], ["a"]),
        ("unique", [1, 1, 2], {1, 2}),
        ("table", {"a": 1}, {"a": 1.0}),
        ("time", {"minutes": 15}, timedelta(minutes=15)),
        ("function", "recipe_toys.double", toys.double),
        ("kind", "recipe_toys.Inner", toys.Inner),
        ("nested", {"name": "n", "plain": {"width": 4}}, toys.Outer("n", plain=toys.Inner(4))),
        ("parts", [{"width": 4}], [toys.Inner(4)]),
        ("anything", {"a": [1, {"b": "torch.bfloat16"}]}, {"a": [1, {"b": "torch.bfloat16"}]}),
        ("wrong_default", None, None),
        ("bare", 2048, 2048),
    ],
)
def test_values_by_annotation(key, written, read):
    value = everything(**{key: written})[key]
    assert value == read and type(value) is type(read)


def test_named_list():
    node = {"_target_": "recipe_toys.Everything", "names": {"one": "a", "two": None, "three": "b"}}
    assert fdl.build(translate(node)).arguments["names"] == ["a", "b"]


def test_shared_node_stays_one_object():
    cfg = OmegaConf.create(
        {"inner": {"_target_": "recipe_toys.Inner"}, "all": {"a": "${inner}", "b": "${inner}", "c": ["${inner}"]}}
    )
    shared = translate(cfg).pop("all")
    assert shared["a"] is shared["b"] is shared["c"][0]
    built = fdl.build(shared)
    assert built["a"] is built["b"]


def test_recipe_functions_are_called():
    assert translate({"_target_": "recipe_toys.recipe", "width": 3}) == run.Config(toys.Inner, width=3, heads=2)
    assert translate({"a": {"_target_": "recipe_toys.maybe", "width": None}}) == {"a": None}
    assert translate({"_target_": "recipe_toys.double", "number": 3}) == run.Config(toys.double, number=3)


def test_default_factory_child_without_target_keeps_what_the_factory_says():
    outer = translate({"_target_": "recipe_toys.Outer", "name": "n", "inner": {"width": 32}})
    assert outer.inner == run.Config(toys.WideInner, heads=4, width=32)
    assert fdl.build(outer).inner.depth == 8, "derived from the new width, not the factory's"
    assert fdl.build(translate({"_target_": "recipe_toys.Outer", "name": "n", "sizes": {"a": 1}})).sizes == {"a": 1}


def test_explicit_null_survives_annotated_arguments():
    task = translate({"_target_": "recipe_toys.task", "_partial_": True, "model": None, "log": None})
    assert task.log is None
    without_translation = run.Partial(toys.task, model=None, log=None)
    assert without_translation.log == run.Config(toys.Inner), "else the test above shows nothing"


def test_positional_arguments():
    assert translate({"_target_": "recipe_toys.Inner", "_args_": [3]}) == run.Config(toys.Inner, width=3)
    assert translate({"_target_": "pathlib.Path", "_args_": ["/x"]}) == run.Config(Path, "/x")


def test_keywords_reach_constructors():
    assert everything(text="a")["text"] == "a"
    built = fdl.build(translate({"_target_": "recipe_toys.Passes", "project": "p", "group": "g"}))
    assert built.kwargs == {"group": "g"}


def test_result_travels():
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    node = {
        "_target_": "recipe_toys.Everything",
        "path": "/x",
        "time": {"hours": 1},
        "mode": "SAFE",
        "pair": [1, 2],
        "function": "recipe_toys.double",
        "nested": {"name": "n"},
    }
    config = translate(node)
    assert ZlibJSONSerializer().deserialize(ZlibJSONSerializer().serialize(config)) == config


def test_the_config_is_not_changed():
    cfg = OmegaConf.create({"a": {"_target_": "recipe_toys.Inner", "width": "${w}"}, "w": 3})
    before = OmegaConf.to_yaml(cfg)
    translate(cfg)
    assert OmegaConf.to_yaml(cfg) == before


# --- what is said -----------------------------------------------------------------------------------------------------


def test_all_problems_in_one_message():
    found = problems_of(
        {
            "optim": {"_target_": "recipe_toys.Everything", "reall": 1, "integer": 1.5, "word": "pree", "pair": [1]},
            "model": {"_target_": "recipe_toys.Outer", "inner": {"widht": 3}},
            "data": {"_target_": "recipe_toys.Passes", "project": "???"},
            "other": {"_target_": "recipe_toys.Swallows", "leval": 3},
            "gone": {"_target_": "recipe_toys.Innner"},
        }
    )
    assert set(found) == {
        "optim.reall",
        "optim.integer",
        "optim.word",
        "optim.pair",
        "model.name",
        "model.inner.widht",
        "data.project",
        "other.leval",
        "gone._target_",
    }
    assert "Did you mean 'optim.real'?" in found["optim.reall"].remedy
    assert (found["optim.integer"].found, found["optim.integer"].expected) == ("1.5", "int")
    assert found["optim.word"].expected == "'pre' or 'post'" and "'pre'" in found["optim.word"].remedy
    assert found["model.name"].remedy == "Set it: model.name=..."
    assert "model.inner.width" in found["model.inner.widht"].remedy
    assert found["data.project"].found == "??? (not set)" and found["data.project"].remedy == "Set it: data.project=..."
    assert "other.level" in found["other.leval"].remedy
    assert "'Inner'" in found["gone._target_"].remedy


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("integer", True),
        ("integer", "3"),
        ("integer", 3.0),
        ("integer", None),
        ("real", "fast"),
        ("real", float("nan")),
        ("flag", 1),
        ("flag", "yes"),
        ("text", 1.5),
        ("text", True),
        ("either", "x"),
        ("either", False),
        ("numeral", 64),
        ("dtype", "bf17"),
        ("mode", "SLOW"),
        ("pair", [1, "a"]),
        ("names", "a"),
        ("table", [1]),
        ("table", {"a": "b"}),
        ("time", 15),
        ("time", {"minuts": 15}),
        ("function", "nowhere.at.all"),
        ("function", "double"),
        ("nested", {"_target_": "recipe_toys.Inner"}),
        ("parts", [{"_target_": "recipe_toys.Outer", "name": "n"}]),
    ],
)
def test_wrong_type(key, value):
    (where,) = problems_of({"node": {"_target_": "recipe_toys.Everything", key: value}})
    assert where.startswith(f"node.{key}")


def test_problem_stands_where_the_value_is_written():
    found = problems_of(
        {
            "trainer": {"strategy": "${strategy}", "again": "${strategy}", "precision": "${precision}"},
            "strategy": {"_target_": "recipe_toys.Swallows", "tensr": 3, "level": "${precision}"},
            "precision": "bf16",
        }
    )
    assert set(found) == {"strategy.tensr", "precision"}


def test_interpolations_that_fail():
    found = problems_of(
        {
            "a": {"_target_": "recipe_toys.Inner", "width": "${optim.max_lrr}"},
            "b": {"_target_": "recipe_toys.Inner", "width": "${optim.min_lr}"},
            "c": {"_target_": "recipe_toys.Inner", "width": "${no_such_resolver:1}"},
            "optim": {"max_lr": 1, "min_lr": "???"},
            "d": {"self": "${d}"},
        }
    )
    assert set(found) == {"a.width", "optim.min_lr", "c.width", "d.self"}
    assert "'optim.max_lr'" in found["a.width"].remedy


def test_missing_argument_of_a_base_that_the_class_provides():
    assert translate({"_target_": "recipe_toys.Swallows"}) == run.Config(toys.Swallows)
    assert set(schema_of(toys.Swallows).parameters) == {"own", "sampler", "root", "level"}


def test_near_miss_where_kwargs_go_elsewhere():
    assert set(problems_of({"w": {"_target_": "recipe_toys.Passes", "project": "p", "save_dirr": "x"}})) == {
        "w.save_dirr"
    }


@pytest.mark.parametrize("key", ["_recursive_", "_convert_"])
def test_hydra_keys_without_meaning_are_refused(key):
    assert set(problems_of({"a": {"_target_": "recipe_toys.Inner", key: "all"}})) == {f"a.{key}"}


def test_error_of_a_recipe_function():
    found = problems_of({"a": {"_target_": "recipe_toys.recipe", "width": -1}})
    assert "width can't be negative" in found["a"].remedy


def test_object_that_is_not_callable():
    assert "_call_: false" in problems_of({"a": {"_target_": "torch.bfloat16"}})["a._target_"].remedy


def test_error_inside_an_imported_module_is_a_bug(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("import no_such_module_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        translate({"_target_": "broken_module.X"})


def test_partial_may_leave_arguments_open():
    translate({"_target_": "recipe_toys.Outer", "_partial_": True})
    assert callable(finetune_recipe)
