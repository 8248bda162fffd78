"""`python -m rollingq_jax.predict`: a table from whatever form of new data."""

import csv

import numpy as np
import pytest
from etils import epath

import rollingq_jax as rq
from rollingq_jax.analysis.metrics import csv_writer
from rollingq_jax.data.preprocessing import InputSpec
from rollingq_jax.evaluate import evaluate
from rollingq_jax.predict import command, predict
from rollingq_jax.train.cli import read_python, run_command
from rollingq_jax.train.loop import train_and_evaluate
from tests.data.sources.test_media_folder import save_tokenizer


@pytest.fixture(scope="module")
def test_arrays(workdir):
    with np.load(workdir.parent / "data.npz") as file:
        return {key.removeprefix("test/"): file[key] for key in file if key.startswith("test/")}


@pytest.fixture(scope="module")
def expected(workdir, test_arrays):
    return rq.load(workdir)(test_arrays)


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def column(lines, name):
    return np.array([float(line[name]) for line in lines])


def check(lines, expected):
    found = np.stack([column(lines, f"probability/{c}") for c in range(3)], axis=-1)
    np.testing.assert_allclose(found, expected.probabilities, atol=1e-6)
    assert [int(line["predicted"]) for line in lines] == expected.probabilities.argmax(-1).tolist()
    for m, share in expected.attention_share.items():
        np.testing.assert_allclose(column(lines, f"share/{m}"), share.mean(-1), atol=1e-6)


def test_columns_and_values(workdir, test_arrays, expected, tmp_path):
    found = predict(
        workdir, str(workdir.parent / "data.npz"), tmp_path / "new" / "out.csv", batch_size=4
    )
    lines = read(tmp_path / "new" / "out.csv")
    assert list(lines[0]) == (
        ["id", "predicted", *(f"probability/{c}" for c in range(3)), "share/audio", "share/visual"]
        + ["label"]
    )
    check(lines, expected)
    assert [line["id"] for line in lines] == [str(i) for i in range(12)]
    assert [int(line["label"]) for line in lines] == test_arrays["label"].tolist()
    hits = expected.probabilities.argmax(-1) == test_arrays["label"]
    assert found == {
        "examples": 12, "missing": {"audio": 0, "visual": 0}, "labeled": 12, "accuracy": hits.mean()
    }  # fmt: skip


@pytest.mark.parametrize("form", ["bare npz", "npy", "one split"])
def test_forms_without_labels(form, workdir, test_arrays, expected, tmp_path):
    arrays = {m: test_arrays[m] for m in ("audio", "visual")}
    ids = np.array([f"clip {i}" for i in range(12)])
    path = tmp_path / "new.npz"
    if form == "npy":
        path = tmp_path / "folder"
        path.mkdir()
        for name, array in {**arrays, "id": ids}.items():
            np.save(path / f"{name}.npy", array)
    elif form == "one split":
        np.savez(path, **{f"valid/{name}": a for name, a in {**arrays, "id": ids}.items()})
    else:
        np.savez(path, **arrays, id=ids)
    found = predict(workdir, str(path), tmp_path / "out.csv")
    lines = read(tmp_path / "out.csv")
    check(lines, expected)
    assert "accuracy" not in found and "label" not in lines[0]
    assert [line["id"] for line in lines] == ids.tolist()


def test_what_is_missing(workdir, test_arrays, tmp_path):
    has = np.arange(12) % 3 > 0
    np.savez(tmp_path / "some.npz", audio=test_arrays["audio"], visual=test_arrays["visual"],
             mask_visual=has)  # fmt: skip
    found = predict(workdir, str(tmp_path / "some.npz"), tmp_path / "some.csv")
    assert found["missing"] == {"audio": 0, "visual": 4}
    assert ((column(read(tmp_path / "some.csv"), "share/visual") > 0) == has).all()
    np.savez(tmp_path / "one.npz", audio=test_arrays["audio"])
    found = predict(workdir, str(tmp_path / "one.npz"), tmp_path / "one.csv")
    assert found["missing"] == {"audio": 0, "visual": 12}
    lines = read(tmp_path / "one.csv")
    alone = rq.load(workdir)({"audio": test_arrays["audio"]})
    check(lines, alone)


def test_labels_of_no_class_count_in_no_accuracy(workdir, test_arrays, tmp_path, caplog):
    label = test_arrays["label"].copy()
    label[:2] = 7
    np.savez(tmp_path / "new.npz", **(test_arrays | {"label": label}))
    found = predict(workdir, str(tmp_path / "new.npz"), tmp_path / "out.csv")
    assert found["labeled"] == 10 and "2 labels are of no class" in caplog.text
    assert read(tmp_path / "out.csv")[0]["label"] == "7"


@pytest.mark.parametrize(
    ("change", "flags", "says"),
    [
        ({"audio": None, "visual": None}, [], "holds label; allowed: at least one of"),
        ({"visual": np.zeros((12, 7))}, [], "visual has shape"),
        ({"visual": np.zeros((11, 5))}, [], "11"),
        ({"visual": np.full((12, 5), np.nan)}, [], "visual holds NaN"),
        ({"label": np.zeros((12, 2), int)}, [], "label: int64[12, 2]; allowed"),
        ({}, ["--split", "dev"], "split is 'dev'; allowed: "),
        ({}, ["--batch_size", "5"], "allowed: a power of two"),
        ({}, ["--batch_size", "many"], "--batch_size is 'many'; allowed: an integer >= 1"),
    ],
)
def test_mistakes_are_one_line_and_leave_the_old_table(
    change, flags, says, workdir, test_arrays, tmp_path, capsys
):
    arrays = {k: v for k, v in (test_arrays | change).items() if v is not None}
    np.savez(tmp_path / "new.npz", **arrays)
    out = tmp_path / "out.csv"
    out.write_text("old\n")
    argv = ["predict", "--workdir", str(workdir), "--path", str(tmp_path / "new.npz")]
    code = run_command(command, [*argv, "--out", str(out), *flags])
    error = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and says in error[-1], error
    assert out.read_text() == "old\n" and not list(tmp_path.glob(".*"))


def test_the_command_prints_what_it_found(workdir, tmp_path, capsys):
    argv = ["predict", "--workdir", str(workdir), "--path", str(workdir.parent / "data.npz")]
    assert run_command(command, [*argv, "--out", str(tmp_path / "out.csv")]) == 0
    printed = capsys.readouterr().out
    assert "accuracy" in printed and "examples" in printed and "out.csv" in printed


def evaluated(workdir, arrays, path):
    np.savez(path, **arrays)
    return evaluate(workdir, path=str(path))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"visual": np.zeros((12, 7))}, "visual has shape"),
        ({"visual": np.full((12, 5), np.nan)}, "visual holds NaN"),
        ({"visual": np.full((12, 5), 1e300)}, "visual holds NaN or infinity"),
        ({"visual": np.full((12, 5), 1j)}, "complex128"),
        ({"visual": np.full((12, 5), "1")}, "<U1"),
        ({"visual": np.float32(1)}, "visual: a single number"),
        ({"mask_visual": np.full(12, 0.5)}, "mask_visual: dtype float64"),
        ({"mask_visual": np.arange(12)}, "mask_visual: dtype int64"),
    ],
)
def test_evaluation_takes_no_array_that_prediction_refuses(
    change, says, workdir, test_arrays, tmp_path
):
    with pytest.raises(rq.DataError, match=says):
        evaluated(workdir, test_arrays | change, tmp_path / "new.npz")
    with pytest.raises(rq.DataError):
        predict(workdir, str(tmp_path / "new.npz"), tmp_path / "out.csv", quiet=True)


@pytest.mark.parametrize("text", ["{}", " {} "])
def test_numbers_written_as_text_are_labels_as_in_training(
    text, workdir, test_arrays, tmp_path, expected
):
    written = np.array([text.format(number) for number in test_arrays["label"]], "S")
    np.savez(tmp_path / "new.npz", **(test_arrays | {"label": written}))
    found = predict(workdir, str(tmp_path / "new.npz"), tmp_path / "out.csv", quiet=True)
    hits = expected.probabilities.argmax(-1) == test_arrays["label"]
    assert (found["labeled"], found["accuracy"]) == (12, hits.mean())


def test_names_of_classes_and_numbers_of_classes_as_text():
    from rollingq_jax.data.new_data import label_texts

    cats, numbers = (InputSpec({}, 2, names) for names in (("cat", "dog"), ("2", "1")))
    assert label_texts(np.array(["1", "0", ""]), cats) == ["dog", "cat", ""]
    assert label_texts(np.array(["2", "1"]), numbers) == ["2", "1"]  # they are names
    assert label_texts(np.array(["dog ", "cow"]), cats) == ["dog", "cow"]
    assert label_texts(np.array([1.0, 7.0]), cats) == ["dog", "7"]


@pytest.mark.parametrize("text", ["a\rb", "a\nb", "a\r\nb", 'say "a", b', "=1+1", "\ud800"])
def test_any_text_stands_in_one_cell(text, tmp_path):
    with csv_writer(epath.Path(tmp_path / "out.csv")) as write:
        write(iter([["id", text], [text, "2"]]))
    found = [text.encode("utf-8", "backslashreplace").decode()] * 2
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["id", found[0]], [found[1], "2"]]


def test_the_table_does_not_take_the_place_of_the_data(workdir, test_arrays, tmp_path):
    np.savez(tmp_path / "new.npz", **test_arrays)
    (tmp_path / "link.npz").symlink_to(tmp_path / "new.npz")
    before = (tmp_path / "new.npz").read_bytes()
    for path in ("new.npz", "link.npz"):
        with pytest.raises(rq.ConfigError, match="holds the new data"):
            predict(workdir, str(tmp_path / path), tmp_path / "new.npz", quiet=True)
    (tmp_path / "manifest.csv").write_text("label,audio\n")
    with pytest.raises(rq.ConfigError, match="holds the new data"):
        predict(workdir, str(tmp_path), tmp_path / "manifest.csv", quiet=True)
    assert (tmp_path / "new.npz").read_bytes() == before


def test_a_model_with_more_outputs_than_classes_has_a_column_for_each():
    inputs = InputSpec({}, 2, ("cat", "dog"))
    assert inputs.with_outputs(4).classes == ("cat", "dog", "class 2", "class 3")
    assert InputSpec({}, 2).with_outputs(3).classes == ("0", "1", "2")
    assert inputs.with_outputs(2) == inputs


@pytest.mark.slow
def test_texts_are_read_with_the_runs_own_tokenizer(tmp_path):
    """The one that it was trained with is gone; the copy in its folder is known by its checksum."""
    rows = ["split,label,said:string,also:string"]
    for number in range(24):
        split, word = "train" if number < 16 else "test", ("cat", "dog")[number % 2]
        rows.append(f"{split},{word},{word} ab,ab ab")
    (tmp_path / "m.csv").write_text("\n".join(rows))
    config = read_python("own_data")
    fields = {"epochs": 1, "optimizer.warmup_epochs": 0.5, "batch_size": 8}
    fields |= {"data.path": str(tmp_path / "m.csv"), "model.dim": 8, "optimizer.name": "sgd"}
    config.update_from_flattened_dict(fields | {"model.depth": 1, "model.num_heads": 2})
    config.data.tokenizer = save_tokenizer(tmp_path / "t.json")
    train_and_evaluate(config, tmp_path / "run", quiet=True)
    before = rq.load(tmp_path / "run")({"said": ["cat ab", "dog"], "also": ["ab", None]})
    (tmp_path / "t.json").unlink()
    (tmp_path / "run").rename(tmp_path / "moved")
    again = rq.load(tmp_path / "moved")({"said": ["cat ab", "dog"], "also": ["ab", None]})
    np.testing.assert_array_equal(again.probabilities, before.probabilities)
    found = predict(tmp_path / "moved", str(tmp_path / "m.csv"), tmp_path / "out.csv")
    assert found["accuracy"] == evaluate(tmp_path / "moved")["accuracy"]
