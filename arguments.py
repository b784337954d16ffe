"""Command lines: options in groups, presets that fill in what is not given, and one line for whatever is wrong."""

import argparse
import difflib
import sys

# What people of this field type; of the names in a row each script knows some, and points to them.
SYNONYMS = (
    ("--epochs", "--iters", "--total_samples", "--finetune_steps", "--steps", "--max_steps", "--num_epochs"),
    ("--batch_size_per_gpu", "--batch_size", "--bs", "--train_batch_size"),
    ("--base_lr", "--lr", "--learning_rate"),
    ("--ckpt", "--init", "--checkpoint", "--weights", "--pretrained", "--pretrained_weights", "--model", "--resume"),
    ("--data", "--data_path", "--data_dir", "--dataset", "--input", "--images"),
    ("--output_dir", "--json", "--output", "--out", "--out_dir", "--save_dir"),
    ("--num_workers", "--workers"),
    ("--global_crops_size", "--img_size", "--canvas", "--image_size", "--input_size", "--size"),
    ("--warmup_fraction", "--warmup_epochs", "--warmup_iters", "--warmup_steps"),
    ("--layerwise_decay", "--layer_decay"),
    ("--drop_path_rate", "--drop_path"),
    ("--group_regex", "--groups", "--patient_regex"),
    ("--seed", "--random_seed"),
    ("--dtype", "--precision", "--amp", "--fp16", "--bf16"),
    ("--head_n_prototypes", "--out_dim", "--n_prototypes"),
)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):  # a default that is worked out later is told by the help itself
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with our habits: whole names only, defaults in the help, no page of usage above an error or the help."""

    def __init__(self, description, usage="%(prog)s [OPTION ...]", **more):
        super().__init__(description=description, usage=usage, allow_abbrev=False, formatter_class=Help, **more)

    def error(self, message):
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        raise SystemExit(2)

    def parse(self, argv, preset=None):
        """(arguments, names of those that were given). preset: given arguments -> {name: default that goes before the
        option's own}, where one choice decides others."""
        own = {action.dest: action.default for action in self._actions if action.dest != "help"}
        args, unknown = self.parse_known_args(argv, argparse.Namespace(**dict.fromkeys(own)))
        wrong = [word for word in unknown if word.startswith("-")] or unknown
        if wrong:
            word = wrong[0].split("=")[0]
            self.error(f"{word}: no such option{self.nearest(word)}")
        given = {name for name, value in vars(args).items() if value is not None}
        for name, value in {**own, **(preset(args) if preset else {})}.items():
            if name not in given:
                setattr(args, name, value)
        return args, given

    def nearest(self, word):
        known = [name for action in self._actions for name in action.option_strings]
        alike = [name for names in SYNONYMS if word in names for name in names if name in known]
        alike = alike or difflib.get_close_matches(word, known, n=1)
        return f"; did you mean {' or '.join(alike)}?" if alike else "; see --help"

    def check(self, args, least=None, shares=(), positive=()):
        """An error where an argument is below its `least` {name: number}, a share is not from 0 to below 1, or what
        must be positive is not; None, where no argument was given, is fine."""
        for name, low in (least or {}).items():
            if getattr(args, name) is not None and not low <= getattr(args, name) < float("inf"):
                self.error(f"--{name} must be at least {low}, not {getattr(args, name)}")
        for name in shares:
            if not 0 <= getattr(args, name) < 1:
                self.error(f"--{name} is a share from 0 to below 1, not {getattr(args, name)}")
        for name in positive:
            if not 0 < getattr(args, name) < float("inf"):
                self.error(f"--{name} must be positive, not {getattr(args, name)}")


def stage_parser(doc, presets):
    """The Parser of a fine-tuning stage: its first preset is what the options' defaults are, "cpu" the other one."""
    return Parser(doc.split("\n")[0], epilog=f"Defaults are those of --preset {next(iter(presets))}; cpu has "
                  f"{in_words(presets['cpu'])}.")


def add_run(p, presets, output_dir, eval_batch_size, save_every, unit):
    """The group of options that every fine-tuning stage has; returns it."""
    run = p.add_argument_group("the run")
    add = run.add_argument
    add("--preset", choices=presets, help=f"recipe; {next(iter(presets))} with --data, else cpu")
    add("--seeds", type=int, default=1, help="training seeds of each model; their mean is scored")
    add("--seed", type=int, default=0, help="the first of them, and of the statistics")
    add("--dtype", choices=("bfloat16", "float32"), help="of matrix products; default: bfloat16 on a GPU")
    add("--eval_batch_size", type=int, default=eval_batch_size, help="images per forward pass where nothing is learned")
    add("--output_dir", default=output_dir, help="where everything goes; the same command again resumes")
    add("--save_every", type=int, default=save_every, help=f"{unit} between checkpoints of a run")
    return run


def by_data(presets):
    """What `parse` takes: the preset that is given, else the first with --data, else cpu."""
    def preset(args):
        name = args.preset or (next(iter(presets)) if args.data else "cpu")
        return {**presets[name], "preset": name}

    return preset


def in_words(preset):
    """What a preset sets, for the help."""
    def text(value):
        return " ".join(map(str, value)) if isinstance(value, list) else str(value)

    return ", ".join(f"--{name} {text(value)}" for name, value in preset.items())
