"""Command lines: one line for whatever is wrong, the nearest name, presets under flags, help in groups."""

import argparse
import os
from pathlib import Path

import pytest

import fewshot
import finetune_cls
import finetune_multi
import finetune_seg
import pack
import predict
import pretrain
from arguments import Parser
from tools import phantom_sheet, score_submission

SCRIPTS = {"pretrain": pretrain, "pack": pack, "fewshot": fewshot, "finetune_cls": finetune_cls,
           "finetune_seg": finetune_seg, "finetune_multi": finetune_multi, "predict": predict,
           "score_submission": score_submission, "phantom_sheet": phantom_sheet}
NEEDED = {"pack": ["src", "out"], "score_submission": ["out", "--data", "data"], "phantom_sheet": ["out.png"]}


def refused(capsys, get_args, flags):
    """The one line on stderr of a command that ends with status 2."""
    with pytest.raises(SystemExit) as left:
        get_args(flags)
    assert left.value.code == 2
    out, error = capsys.readouterr()
    assert not out and error.count("\n") == 1 and ": error: " in error
    return error.split(": error: ")[1].strip()


@pytest.mark.parametrize("script, flags, nearest", [
    ("pretrain", ["--epochs", "100"], "--total_samples"), ("pretrain", ["--lr=1e-3"], "--base_lr"),
    ("pretrain", ["--batch_size", "8"], "--batch_size_per_gpu"), ("pretrain", ["--weights", "a.pt"], "--init"),
    ("pretrain", ["--total_sample", "9"], "--total_samples"), ("pack", ["--canvass", "9"], "--canvas"),
    ("pack", ["--num_workers", "9"], "--workers"), ("fewshot", ["--output_dir", "x"], "--json"),
    ("fewshot", ["--shot", "5"], "--shots"), ("finetune_cls", ["--iters", "5"], "--epochs"),
    ("finetune_cls", ["--model", "a.pt"], "--ckpt"), ("finetune_seg", ["--epochs", "5"], "--iters"),
    ("finetune_multi", ["--epochs", "5"], "--iters"), ("finetune_multi", ["--init", "a.pt"], "--ckpt"),
    ("predict", ["--batchsize", "5"], "--batch_size"), ("predict", ["--images", "x"], "--data"),
    ("score_submission", ["--jsn", "5"], "--json"), ("phantom_sheet", ["--sise", "5"], "--size")])
def test_a_wrong_flag_is_one_line_with_the_nearest_name(capsys, script, flags, nearest):
    error = refused(capsys, SCRIPTS[script].get_args, [*NEEDED.get(script, []), *flags])
    assert error == f"{flags[0].split('=')[0]}: no such option; did you mean {nearest}?"


@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_alike_points_to_the_help(capsys, script):
    error = refused(capsys, SCRIPTS[script].get_args, [*NEEDED.get(script, []), "--zzzzzz"])
    assert error == "--zzzzzz: no such option; see --help"


@pytest.mark.parametrize("script, flags, words", [
    ("pretrain", ["--arch", "vit_enormous"], "invalid choice: 'vit_enormous'"),
    ("pretrain", ["--seed"], "argument --seed: expected one argument"), ("pack", [], "required: SRC, OUT"),
    ("fewshot", ["--shots", "many"], "argument --shots: invalid int value: 'many'"),
    ("finetune_cls", ["stray"], "stray: no such option; see --help")])
def test_other_errors_are_one_line_too(capsys, script, flags, words):
    assert words in refused(capsys, SCRIPTS[script].get_args, flags)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_in_groups_and_names_no_folder_of_this_machine(capsys, script):
    with pytest.raises(SystemExit) as left:
        SCRIPTS[script].get_args(["--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0 and "None" not in text
    assert str(Path(pretrain.__file__).parent) not in text and os.path.expanduser("~") not in text
    groups = {line for line in text.split("\n") if line.endswith(":") and not line.startswith(" ")}
    assert script in NEEDED or len(groups - {"options:"}) >= 2


# ---------------------------------------------------------------- the parser

def parser():
    p = Parser("Something.")
    p.add_argument("--size", type=int, default=1)
    p.add_argument("--share", type=float, default=0.5)
    p.add_argument("--flag", action=argparse.BooleanOptionalAction, default=True)
    p.add_argument("--names", nargs="+", default=["a"])
    return p


@pytest.mark.parametrize("flags, expected, given", [
    ([], (7, 0.5, True, ["b"]), set()), (["--size", "1"], (1, 0.5, True, ["b"]), {"size"}),
    (["--no-flag", "--names", "a"], (7, 0.5, False, ["a"]), {"flag", "names"}),
    (["--share", "0"], (9, 0.0, True, ["b"]), {"share"})])
def test_a_flag_goes_before_the_preset_and_the_preset_before_the_default(flags, expected, given):
    """Also where the flag says what the default is."""
    args, found = parser().parse(flags, lambda args: {"size": 7 if args.share is None else 9, "names": ["b"]})
    assert (args.size, args.share, args.flag, args.names) == expected and found == given


@pytest.mark.parametrize("value, words", [
    (dict(size=0), "--size must be at least 1, not 0"), (dict(size=float("nan")), "--size must be at least 1"),
    (dict(size=float("inf")), "--size must be at least 1"), (dict(share=1.0), "--share is a share from 0 to below 1"),
    (dict(share=-0.1), "--share is a share"), (dict(rate=0.0), "--rate must be positive"),
    (dict(rate=float("inf")), "--rate must be positive")])
def test_numbers_out_of_range(capsys, value, words):
    fine = dict(size=None, share=0.0, rate=1e-9)
    p = parser()
    p.check(argparse.Namespace(**fine), dict(size=1), ["share"], ["rate"])
    p.check(argparse.Namespace(**{**fine, "size": 1}), dict(size=1))

    def check(_):
        p.check(argparse.Namespace(**{**fine, **value}), dict(size=1), ["share"], ["rate"])

    assert words in refused(capsys, check, [])
