"""What `sparse-signals answer` does: read questions, split the answers' difference, write files."""

import sys
import warnings
from argparse import Namespace
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from sparse_signals.app.commands import (
    CHUNKS,
    FILES,
    Job,
    carry_out,
    in_one_line,
    open_folder,
    open_model,
    outcome,
    say,
    warnings_said,
)
from sparse_signals.app.directions import ALONG, read_direction
from sparse_signals.app.errors import PROGRAM, UsageError
from sparse_signals.attribution.aligned import AlignedRuns, Counterfactual, ShareError
from sparse_signals.attribution.answer import (
    AnswerTrace,
    reference_mean,
    trace_answer,
    vocabulary_mean,
)
from sparse_signals.attribution.tables import AnswerSettings, Asked, place_name, role_names
from sparse_signals.core.model import Model
from sparse_signals.core.numbers import fmt, signed_percent
from sparse_signals.core.prompts import Batch, PromptError, encode, is_word
from sparse_signals.core.questions import Questions, answer_words, questions
from sparse_signals.core.reading import read_texts, with_names
from sparse_signals.core.resume import run_key, write_parquet
from sparse_signals.core.tasks import TASKS, ioi_counterfactuals, task_prompts
from sparse_signals.tracing.circuit import Circuit

GIVEN, OF_TASK = "the counterfactuals given", "the counterfactuals of the task"
FLIP = "the same with IO in the place of the second S"
MEAN = "no other prompt, but the mean embeddings of the prompts of as many tokens"
VOCABULARY = "no other prompt, but the mean embedding of the vocabulary after the first token"
SUMMARY_LINES = {"tokens": 6, "paths": 8, "edges": 10}  # lines of a summary
STRONGEST_EDGES = ["upstream", "role", "channel", "downstream", "dest_role"]


@dataclass(frozen=True)
class AnswerJob(Job[AnswerSettings]):
    """A command line that has been understood, with what is asked and what prompts are compared to.

    `compared` says the latter in words. `direction`: F is w·x of the last stream along it.
    """

    questions: Questions
    reference: Counterfactual
    compared: str
    direction: Float[Tensor, "d"] | None

    @cached_property
    def folder(self) -> Path:
        """Where this run keeps what it has, and no run of other settings looks."""
        asked, other = self.questions, self.reference
        tokens = other.tokens.tolist() if isinstance(other, Batch) else self.compared
        along = None if self.direction is None else self.direction.tolist()
        what = (self.options.at, along, asked.right, asked.wrong)
        given = (self.settings, self.chunks, what, tokens)
        return self.partial / run_key(self.model, self.batch, given)

    @property
    def asked(self) -> Asked | None:
        """What F is, in the place of the answer."""
        if self.direction is not None:
            return Asked(f"stream {self.model.n_layers}", "end", self.direction)
        return Asked(*self.options.at) if self.options.at else None

    @cached_property
    def chunks(self) -> list[slice]:
        """Prompts that fit into memory together, with their counterfactuals."""
        asked = self.questions
        return AlignedRuns(self.model, asked.batch, self.reference, asked.objective).fitting()


def execute_answer(options: Namespace, started: float) -> None:
    """Do what the command line says. Raises UsageError for bad input, in one line."""
    with in_one_line():
        carry_out(understand_questions(options, started), run_answer)


def understand_questions(options: Namespace, started: float) -> AnswerJob:
    """Load the model, read the questions, choose what prompts are compared to, open the folder."""
    try:
        settings = AnswerSettings(part=options.part, least=options.least, paths=options.paths)
    except ValueError as error:
        raise UsageError(f"--{error}") from error
    check_ways(options)
    model = open_model(options)
    direction = None if options.direction is None else read_direction(options.direction, model)
    with warnings_said(options):
        table, compared = with_flip(*question_table(options, model), model, options.bos)
        asked = questions(model, table, bos=options.bos)
    if direction is not None:
        asked = replace(asked, notes=())  # which are about answers
    for note in asked.notes:
        say(options, note)
    reference, compared = (asked.counterfactual, compared)
    if reference is None:
        reference, compared = mean_of(model, asked.batch)
        say(options, f"compared with {compared}")
    out = open_folder(options.out)
    return AnswerJob(
        options, model, asked.batch, settings, out, started, asked, reference, compared, direction
    )


# --- questions -----------------------------------------------------------------------------------


def check_ways(options: Namespace) -> None:
    """Raise UsageError for options that belong to another way of giving prompts."""
    for name in ("answer", "wrong", "counterfactual"):
        values = getattr(options, name)
        if values and not options.prompt:
            raise UsageError(f"--{name} goes with --prompt; in a file it is a column")
        if values and len(values) != len(options.prompt):
            raise UsageError(
                f"--{name} is there {len(values)}× for {len(options.prompt)} prompts: give it once "
                "for each, in order"
            )
    if options.direction and (options.at or options.answer or options.wrong):
        raise UsageError(
            "--direction is asked instead of an answer: leave out --at, --answer, --wrong"
        )
    if options.kind and (options.prompt or options.prompts):
        raise UsageError("--kind is a counterfactual of a --task: leave it out")


def question_table(options: Namespace, model: Model) -> tuple[pd.DataFrame, str]:
    """The prompts that the command line asks for, and where their counterfactuals come from."""
    if options.prompt:
        names = ("answer", "wrong", "counterfactual")
        given = {name: getattr(options, name) for name in names if getattr(options, name)}
        return pd.DataFrame({"text": options.prompt} | given), GIVEN
    if options.prompts:
        return read_texts(options.prompts), GIVEN
    table = task_prompts(
        options.task,
        options.n,
        options.seed,
        tokenizer=model.tokenizer,
        counterfactual=options.kind,
    )
    kind = options.kind or next(iter(TASKS[options.task].tables))
    return table, f"{OF_TASK}, {kind}"


def with_flip(
    table: pd.DataFrame, compared: str, model: Model, bos: bool | None
) -> tuple[pd.DataFrame, str]:
    """Names, where all prompts have them; then, where no counterfactual is known, the flip."""
    given = any(is_word(cell) for name in ("io", "s") for cell in table.get(name, []))
    try:
        named = with_names(table)
        with warnings.catch_warnings(action="ignore"):  # which are said later
            encode(model, named, bos=bos)
    except PromptError:
        if given:
            raise
        return table, compared
    if any(map(is_word, table.get("counterfactual", []))):
        return named, compared
    return named.assign(counterfactual=ioi_counterfactuals(named)), FLIP


def mean_of(model: Model, batch: Batch) -> tuple[Counterfactual, str]:
    """What prompts are compared to of which no counterfactual is known."""
    try:
        return reference_mean(model, batch), MEAN
    except ShareError:  # one of them has no other of its form
        return vocabulary_mean(model, batch), VOCABULARY


def describe_questions(job: AnswerJob) -> str:
    """Where the prompts come from, for the facts of a circuit."""
    options, number = job.options, len(job.batch.tokens)
    if options.prompt:
        return options.prompt[0] if number == 1 else f"{number} given"
    if options.prompts:
        return f"{number} from {options.prompts.name}"
    return f"{number} on {options.task}, seed {options.seed}"


def describe_asked(model: Model, asked: Questions) -> str:
    """F in words: that of a prompt with its tokens."""
    if len(asked) > 1:
        return asked.objective.what
    right, wrong = (answer_words(ids, model.tokenizer) for ids in (asked.right[0], asked.wrong[0]))
    return f"logit({right}) − logit({wrong})" if wrong else f"ln P({right})"


# --- the trace -----------------------------------------------------------------------------------


def run_answer(job: AnswerJob) -> str:
    """Trace, write all files, and return a summary."""
    asked = job.questions
    traced = trace_answer(
        job.model,
        job.batch,
        job.reference,
        objective=asked.objective,
        asked=job.asked,
        settings=job.settings,
        folder=job.folder / CHUNKS,
        progress=not job.options.quiet,
    )
    traced = replace(traced, facts=facts_of(job, traced))
    flat = traced.prompts.loc[traced.prompts["flat"], "prompt"].tolist()
    if flat:
        shown = ", ".join(map(str, flat[:10])) + (", …" if len(flat) > 10 else "")
        of = f"{len(flat)} of {len(traced.prompts)} prompts"
        say(job.options, f"what is asked hardly differs on {of}, which are left out: {shown}")
    clusters = asked.template.tolist()
    pooled = pooled_edges(traced, clusters)
    paths = write_answer_files(job, traced, pooled, clusters)
    edges = fmt(round(traced.used["edges"].mean()))
    each = " a prompt" if len(traced.prompts) > 1 else ""
    found = f"{edges} edges{each} carry {signed_percent(traced.explained)} of the difference"
    told = outcome(job, found, pd.Series(dtype=float), paths)
    return "\n".join([told, *answer_summary(traced, pooled, clusters)])


def pooled_edges(traced: AnswerTrace, clusters: list[int]) -> pd.DataFrame:
    """The edges of all graphs by the roles of their tokens; of one prompt, by its tokens."""
    pooled = traced.pool(clusters)
    if len(traced.prompts) > 1:
        return pooled[pooled["prompts"] > 0].reset_index(drop=True)
    edges = traced.edges[traced.edges["graph"]]
    names = {pos: place_name(traced.batch, 0, pos) for pos in traced.tokens["pos"]}
    table = edges.assign(
        role=edges["token"].map(names),
        dest_role=edges["dest"].map(names),
        prompts=1,
        of=1,
        low=edges["share"],
        high=edges["share"],
    )[list(pooled)]
    return table.sort_values("share", key=abs, ascending=False, kind="stable", ignore_index=True)


def facts_of(job: AnswerJob, traced: AnswerTrace) -> dict[str, str]:
    """What was traced and how, for every file."""
    asked, where = describe_asked(job.model, job.questions), ""
    if job.options.direction:
        asked = f"{ALONG} {job.options.direction.name}"
    elif job.options.at:
        where = f"what {traced.facts['asked']} adds to "
    return {
        "model": job.model.name,
        "prompts": describe_questions(job),
        "asked": where + asked,
        "compared with": job.compared,
        "settings": f"{traced.facts['settings']}, dtype {job.options.dtype}",
        **({"note": "; ".join(job.questions.notes)} if job.questions.notes else {}),
        "version": version("sparse-signals"),
    }


def write_answer_files(
    job: AnswerJob, traced: AnswerTrace, pooled: pd.DataFrame, clusters: list[int]
) -> list[Path]:
    """Write the tables, the pooled circuit and the page."""
    names = iter(job.out / name for name in FILES["answer"])
    paths = []
    for table in (edges_with_roles(traced), traced.tokens, traced.paths):
        paths.append(next(names))
        write_parquet(table, paths[-1])
    circuit = Circuit(pooled, traced.facts)
    *graphs, page = names
    paths += [circuit.save(path) for path in graphs]
    if find_spec("altair") is None:
        print(f"{PROGRAM}: no answer.html: pip install 'sparse-signals[charts]'", file=sys.stderr)
        return paths
    from sparse_signals.app.answer_page import write_answer_page

    return [*paths, write_answer_page(page, traced, job.questions, pooled, clusters)]


def edges_with_roles(traced: AnswerTrace) -> pd.DataFrame:
    """The edges of all prompts for a file: roles beside positions."""
    edges, roles = traced.edges, role_names(traced.batch)
    ends = {"role": roles[edges["prompt"], edges["token"]]}
    ends["dest_role"] = roles[edges["prompt"], edges["dest"]]
    return edges.assign(**ends)[
        ["prompt", "upstream", "token", "role", "channel", "downstream", "dest", "dest_role",
         "value", "share", "of_node", "strength", "graph", "up_layer", "down_layer"]
    ]  # fmt: skip


def answer_summary(traced: AnswerTrace, pooled: pd.DataFrame, clusters: list[int]) -> list[str]:
    """What was asked, F of both, tokens by share, the largest paths, the strongest edges."""
    used = traced.used
    numbers = used[["f", "counterfactual_f", "difference"]].mean().map(fmt)
    first, second, whole = numbers.str.replace("-", "−")
    mean = ", means" if len(used) > 1 else ""
    lines = [f"{name}: {traced.facts[name]}" for name in ("asked", "compared with")]
    node = traced.facts["asked"].startswith("what ")
    split = (
        f"the node has {whole} of the difference, which is split" if node else f"split is {whole}"
    )
    lines.append(f"F(x) {first}, F(x′) {second}; {split}{mean}")
    if len(traced.prompts) > 1:
        tokens, paths = traced.pooled_tokens(clusters), traced.pooled_paths(clusters)
        names = tokens["role"]
    else:
        tokens = traced.tokens.sort_values("share", key=abs, ascending=False, kind="stable")
        names = [place_name(traced.batch, 0, pos) for pos in tokens["pos"]]
        paths = traced.paths
    tokens = tokens.assign(name=names).query("value != 0").head(SUMMARY_LINES["tokens"])
    largest = zip(tokens["name"], tokens["share"], strict=True)
    said = (f"{name} {signed_percent(share)}" for name, share in largest)
    lines += [f"tokens by share: {', '.join(said)}", "largest paths:"]
    paths = paths.head(SUMMARY_LINES["paths"])
    for share, text in zip(paths["share"], paths["text"], strict=True):
        lines.append(f"{signed_percent(share):>8}  {text}")
    edges = pooled.head(SUMMARY_LINES["edges"])
    table = edges[STRONGEST_EDGES].assign(
        share=edges["share"].map(signed_percent),
        value=edges["value"].map(fmt),
        prompts=edges["prompts"].astype(str) + "/" + edges["of"].astype(str),
    )
    return [*lines, "strongest edges:", table.to_string(index=False)]
