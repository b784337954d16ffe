"""What other models' files must hold, in any order, and a sentence for each way in which they do not."""

import pathlib

import numpy as np
import pytest

from networks.baselines import list_models, named_files
from scores.exchange import read_features, read_predictions

NAMES = ["a/1.png", "a/2.png", "b/1.png"]
VECTORS = np.arange(6, dtype=np.float64).reshape(3, 2)


def npz(path, name=NAMES, vector=VECTORS, **more):
    np.savez(path, name=name, vector=vector, **more)
    return str(path)


def test_features_come_in_the_order_of_the_set(tmp_path):
    path = npz(tmp_path / "x.npz", [NAMES[2], "other.png", NAMES[0], NAMES[1]], np.arange(8).reshape(4, 2))
    found = read_features(path, NAMES)
    assert found.shape == (3, 1, 2) and found.dtype.is_floating_point
    assert found[:, 0].tolist() == [[4, 5], [6, 7], [0, 1]]


def test_only_the_sets_own_vectors_must_be_finite(tmp_path):
    vectors = np.concatenate((VECTORS, [[np.nan, 0]]))
    assert read_features(npz(tmp_path / "x.npz", NAMES + ["other.png"], vectors), NAMES).isfinite().all()


@pytest.mark.parametrize("write, words", [
    (lambda path: None, ["No such file"]),
    (lambda path: path.write_bytes(b"name,vector\n"), ["expected an .npz", "name (n,) and vector (n, d)"]),
    (lambda path: path.write_bytes(b""), ["expected an .npz"]),
    (lambda path: np.save(path.open("wb"), VECTORS), ["expected an .npz"]),
    (lambda path: np.savez(path, names=NAMES, vector=VECTORS), ["expected an .npz", "name is not a file"]),
    (lambda path: npz(path, [pathlib.Path(name) for name in NAMES]),
     ["expected an .npz", "names must be strings, list(map(str, names))", "the two lines"]),
    (lambda path: npz(path, vector=[["x", "y"]] * 3), ["expected an .npz"]),
    (lambda path: npz(path, np.array([b"\xff.png"] * 3)), ["expected an .npz"]),
    (lambda path: npz(path, vector=VECTORS[:2]), ["(3,)", "(2, 2)", "expected (n,) and (n, d)"]),
    (lambda path: npz(path, vector=VECTORS[:, 0]), ["vector (3,)", "expected (n,) and (n, d)"]),
    (lambda path: npz(path, vector=np.full((3, 2), np.inf)), ["not finite"]),
    (lambda path: npz(path, vector=np.full((3, 2), 1e300)), ["not finite"]),  # in float32
    (lambda path: npz(path, NAMES[:2] + NAMES[:1]), ["a/1.png is there twice"]),
    (lambda path: npz(path, NAMES[:1], VECTORS[:1]), ["2 of 3 images are missing, the first is a/2.png", "a/1.png)"]),
    (lambda path: npz(path, NAMES[:0], VECTORS[:0]), ["3 of 3 images are missing"]),
    (lambda path: npz(path, ["set/" + name for name in NAMES]), ["below its folder", "(here: set/a/1.png)"]),
], ids=range(16))
@pytest.mark.filterwarnings("ignore:overflow")
def test_features_that_do_not_fit(tmp_path, write, words):
    path = tmp_path / "x.npz"
    write(path)
    with pytest.raises(ValueError) as error:
        read_features(str(path), NAMES)
    assert str(error.value).startswith(f"--features {path}: ") and "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


# ---------------------------------------------------------------- predictions

CLASSES = ["benign", "malignant"]


def csv(path, text):
    path.write_text(text)
    return str(path)


def test_probabilities_in_any_order_of_columns_and_rows(tmp_path):
    path = csv(tmp_path / "x.csv", "image,malignant,benign\nb/1.png,0.1,0.9\n\na/1.png,0.7,0.3\nother.png,1,0\n"
                                   "a/2.png,2e-1,8e-1\n")
    scores, ranked = read_predictions(path, NAMES, CLASSES)
    assert ranked and scores.dtype == np.float64
    assert scores.tolist() == [[[0.3, 0.7], [0.8, 0.2], [0.9, 0.1]]]


def test_probabilities_may_be_rounded(tmp_path):
    path = csv(tmp_path / "x.csv", "image,benign,malignant\na/1.png,0.3333,0.6666\n")
    assert read_predictions(path, NAMES[:1], CLASSES)[0].tolist() == [[[0.3333, 0.6666]]]


def test_labels_alone_do_not_rank(tmp_path):
    path = csv(tmp_path / "x.csv", "image,label\na/2.png,malignant\na/1.png,benign\nb/1.png,malignant\n")
    scores, ranked = read_predictions(path, NAMES, CLASSES)
    assert not ranked and scores.tolist() == [[[1, 0], [0, 1], [0, 1]]]


def test_names_with_commas_and_a_byte_order_mark(tmp_path):
    path = csv(tmp_path / "x.csv", '\ufeffimage,label\n"a, 1.png",benign\n')
    assert read_predictions(path, ["a, 1.png"], CLASSES)[0].tolist() == [[[1, 0]]]


@pytest.mark.parametrize("text, words", [
    (None, ["cannot be read", "No such file", "image,label or image,benign,malignant"]),
    ("", ["cannot be read"]),
    ("name,label\n", ["columns are name,label", "expected image,label or image,benign,malignant"]),
    ("image,benign\n", ["columns are image,benign"]),
    ("image,benign,malignant,normal\n", ["columns are image,benign,malignant,normal"]),
    ("image,benign,benign\n", ["columns are image,benign,benign"]),
    ("image,label\na/1.png,benign\n\na/2.png\n", ["line 4", "1 columns, the header has 2"]),
    ("image,label\na/1.png,benign\n", ["2 of 3 images are missing", "a/2.png"]),
    ("image,label\n" + "a/1.png,benign\n" * 2, ["a/1.png is there twice"]),
    ("image,label\n\na/1.png,benign\na/2.png,normal\nb/1.png,benign\n", ["line 4", "'normal'", "benign, malignant"]),
    ("image,benign,malignant\na/1.png,1,0\na/2.png,1,much\nb/1.png,1,0\n", ["line 3", "not all numbers", "much"]),
    ("image,benign,malignant\na/1.png,1,0\na/2.png,1,\nb/1.png,1,0\n", ["line 3", "not all numbers"]),
    ('image,benign,malignant\n"a/1.png",1,0\na/2.png,1,0\nb/1.png,nan,0\n', ["line 4", "not finite"]),
    ("image,benign,malignant\na/1.png,1,0\na/2.png,2.5,-1.5\nb/1.png,1,0\n",  # their sum is 1
     ["line 3", "probabilities expected", "not 2.5, -1.5; apply softmax first"]),
    ("image,benign,malignant\na/1.png,-0.0005,1\na/2.png,1,0\nb/1.png,1,0\n", ["line 2", "probabilities expected"]),
    ("image,benign,malignant\na/1.png,1.0005,0\na/2.png,1,0\nb/1.png,1,0\n", ["line 2", "probabilities expected"]),
    ("image,benign,malignant\na/1.png,1,0\na/2.png,1,0\nb/1.png,0.5,0.502\n", ["line 4", "probabilities expected"]),
    ("image,benign,malignant\na/1.png,1,0\na/2.png,1,0\nb/1.png,0.3,0.5\n", ["line 4", "with sum 1"]),  # sigmoids
], ids=range(18))
def test_predictions_that_do_not_fit(tmp_path, text, words):
    path = tmp_path / "x.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_predictions(str(path), NAMES, CLASSES)
    assert str(error.value).startswith(f"--predictions {path}")
    assert all(word in str(error.value) for word in words), str(error.value)


# ---------------------------------------------------------------- names of models

def test_names_and_files():
    models = list_models(["runs/a=b/last.pt", "ours=x.pt,y.pt", "none", "timm:vit,1", "two=none,none", "z=d/a=b.pt"],
                         "scratch")
    assert [(model.name, model.paths) for model in models] == [
        ("a=b", ["runs/a=b/last.pt"]), ("ours", ["x.pt", "y.pt"]), ("scratch", [None]),
        ("timm:vit,1", ["timm:vit,1"]), ("two", [None, None]), ("z", ["d/a=b.pt"])]
    assert named_files(["theirs=x.npz", "d=1/x.npz", "x.npz"]) == [("theirs", "x.npz"), ("d", "1/x.npz"), ("x", "x.npz")]
    assert named_files(["runs/d=1/x.npz"]) == [("x", "runs/d=1/x.npz")]


@pytest.mark.parametrize("texts, names", [
    (["last.pt", "./last.pt.old", "../x.pth"], ["last", "last.pt", "x"]),
    (["/runs/seed0/last.pt", "seed1/last.pt"], ["seed0", "seed1"]),
    (["last.pt", "../last.pt", "seed0/last.pt"], None),
    (["one/seed0/last.pt", "two/seed0/last.pt", "seed1/last.pt"], ["one/seed0", "two/seed0", "seed1"]),
    (["a/x/y/b.pt", "c/x/y/b.pt", "y/b.pt", "x/y/b.pt"], ["a/x/y/b", "c/x/y/b", "y/b", "x/y/b"]),
    (["x/b.pt", "b=x/b.pt", "scratch.pt", "none"], None),
    (["x/b.pt", "b=x/b.pt", "y/scratch.pt", "none"], ["x/b", "b", "y/scratch", "scratch"]),
    (["seed0/last.pt", "x/seed0.pt"], ["seed0", "x/seed0"]),
    (["timm:vit_small.augreg_in21k", "hub/v1.5", "hub/v1.5/", "dinov2.x.pth"], None),
    (["timm:vit_small.augreg_in21k", "hub/v1.5", "other/v1.5/", "dinov2.x.pth", "."],
     ["timm:vit_small.augreg_in21k", "hub/v1.5", "other/v1.5", "dinov2.x", "here"]),
], ids=str)
def test_models_without_a_name_are_called_after_their_files(tmp_path, monkeypatch, texts, names):
    for folder in ("here/hub/v1.5", "here/other/v1.5"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    if names is None:
        with pytest.raises(ValueError, match="two models are called .*: name them apart, NAME=FILE"):
            list_models(texts, "scratch")
    else:
        models = list_models(texts, "scratch")
        assert [model.name for model in models] == names
        assert [model.paths for model in models] == [[None if text == "none" else text.removeprefix("b=")]
                                                     for text in texts]


@pytest.mark.parametrize("texts, words", [(["a.pt", "a.pt"], "two models are called 'a'"), ([""], "names no file"),
                                          (["a="], "names no file"), (["a=x,"], "names no file")])
def test_names_that_do_not_do(texts, words):
    with pytest.raises(ValueError, match=words):
        list_models(texts, "scratch")
