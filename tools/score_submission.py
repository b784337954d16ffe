"""Score a submission to the FMC_UIA challenge, made by any model, against labelled data.

    python -m tools.score_submission OUT --data fmc_uia
    python -m tools.score_submission OUT --data fmc_uia --json scores.json
"""

import argparse

import runtime
from arguments import Parser
from labelled.fmc_uia import read_tasks
from scores.challenge import score_submission, table
from scores.report import check_output, write_json

SCRIPT = "tools/score_submission.py"


def get_args(argv=None):
    p = Parser(__doc__.split("\n")[0], usage="%(prog)s OUT --data DATA [OPTION ...]")
    p.add_argument("out", help="the submission's folder")
    p.add_argument("--data", required=True, help="the labelled data: the folder with csv_files, or one of CSVs")
    p.add_argument("--skip_wrong_rows", action=argparse.BooleanOptionalAction, default=False,
                   help="leave out rows that are wrong, instead of stopping")
    p.add_argument("--json", help="file to write all scores to")
    return p.parse(argv)[0]


def main(args):
    if args.json:
        check_output(args.json, "--json", SCRIPT)
    data = read_tasks(args.data, skip_wrong_rows=args.skip_wrong_rows)
    for sentence in data.wrong:
        print(f"left out: {sentence}")
    found = score_submission(args.out, data)
    print("\n".join(table(found, data.tasks)))
    print("\nleft of the bar as the challenge scores, missing predictions skipped; right of it they count as wrong; "
          "distances in pixels")
    if args.json:
        write_json(args.json, SCRIPT, args, "cpu", found)
        print(f"wrote {args.json}")


if __name__ == "__main__":
    with runtime.clear_errors():
        main(get_args())
