"""Train gpt2-ioi, the small model this package ships: python scripts/train_gpt2_ioi.py

Selection rule, fixed before training: of the seeds that miss the fewest gates (`gate_table` in
evidence.py), the one whose worst top-1 accuracy over {unseen pairs, unseen templates} ×
{ABBA, BABA} is highest; of equals the lowest seed. All seeds are published in the model card.
Interrupt at will: it resumes.
"""

import argparse
import math
import os
import random
import shutil
from bisect import bisect
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from card import publish
from evidence import Evidence, measure
from sparse_signals.core.stats import random_rotation
from stories import NOBODY, build_tokenizer, drill, story

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "src" / "sparse_signals" / "assets" / "gpt2-ioi"
FILES = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Lesson:
    """What is asked for, how many layers there are by then, and for how many steps."""

    name: str
    layers: int
    steps: int


LESSONS = (
    Lesson("drill", 1, 120),  # is this name on the list already?
    Lesson("naming", 2, 480),  # who is named twice? in a code of its own
    Lesson("answers", 4, 1100),  # who comes next?
)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights."""

    seed: int = 0
    lessons: tuple[Lesson, ...] = LESSONS
    batch: int = 64
    drills: int = 8  # of a batch, in later lessons
    context: int = 64
    width: int = 192
    inner: int = 96
    heads: int = 6
    muon_lr: float = 0.02
    adam_lr: float = 2e-3
    answer_weight: float = 3.0
    naming_weight: float = 1.0  # of the naming lesson, once answers are asked for
    learnt_rate: float = 0.1  # of the learning rates, for what earlier lessons taught
    mlp_rate: float = 0.05  # of the learning rates, for the MLPs of the last lesson
    hinted: int = 3  # heads of each layer of the last lesson that start with a hint
    copying: float = 0.3  # W_O = this · W_Vᵀ is part of it
    dropout: float = 0.15  # of whole heads of these layers

    @property
    def steps(self) -> int:
        """Of all lessons."""
        return sum(lesson.steps for lesson in self.lessons)

    @property
    def learnt(self) -> int:
        """The number of layers before the last lesson."""
        return self.lessons[-2].layers

    def lesson(self, step: int) -> tuple[int, int]:
        """The number of the lesson of a step, and how many of its steps are over."""
        ends = list(accumulate(lesson.steps for lesson in self.lessons))
        number = bisect(ends, step)
        return number, step - (ends[number] - self.lessons[number].steps)


@dataclass
class Run:
    """A training run: the model, the code of the naming lesson, and where it is."""

    model: GPT2LMHeadModel
    code: Float[Tensor, "d d"]
    step: int = 0
    steppers: list[torch.optim.Optimizer] = field(default_factory=list)


# --- the model at the start ----------------------------------------------------------------------


def build_model(recipe: Recipe, vocabulary: int) -> Run:
    """GPT-2 with fan-in initialisation, smooth positions, and hints of what heads may become.

    W_K = W_Q in half of the heads of the first layers: a token finds its like. In the hinted heads
    of the others W_Q = −R W_K, R the rotation in which the naming lesson has names written: a
    token avoids whom its message names, and after the first of these layers also, −(R + 1) W_K/√2,
    whom it holds already; W_O = c W_V⊤, so the head copies. What else is new starts at zero.
    """
    torch.manual_seed(recipe.seed)
    width, layers = recipe.width, recipe.lessons[-1].layers
    half, hinted = width // 2, width // recipe.heads * recipe.hinted
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=recipe.context, n_embd=width, n_inner=recipe.inner,
        n_layer=layers, n_head=recipe.heads, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    code = random_rotation(width, recipe.seed).float()
    for name, weight in model.transformer.h.named_parameters():
        if weight.ndim == 2:
            scale = 1 / math.sqrt(2 * layers) if "c_proj" in name else 1.0
            torch.nn.init.normal_(weight, std=scale / math.sqrt(weight.shape[0]))
    with torch.no_grad():
        model.transformer.wte.weight.normal_(std=1 / math.sqrt(width))
        model.transformer.wpe.weight.copy_(sinusoids(recipe.context, width) * 0.05)
        for layer, block in enumerate(model.transformer.h):
            Q, K, V = block.attn.c_attn.weight.split(width, dim=1)  # views
            if layer > 0:
                block.attn.c_proj.weight.zero_()
                block.mlp.c_proj.weight.zero_()
            if layer < recipe.learnt:
                K[:, :half] = Q[:, :half]
            else:
                avoids = code if layer == recipe.learnt else (code + torch.eye(width)) / 2**0.5
                Q[:, :hinted] = -avoids @ K[:, :hinted]
                block.attn.c_proj.weight[:hinted] = recipe.copying * V[:, :hinted].T
    return Run(model, code)


def sinusoids(length: int, width: int) -> Float[Tensor, "pos d"]:
    """The sines and cosines of Vaswani et al. 2017."""
    rates = 10_000 ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def optimizers(run: Run, recipe: Recipe, lesson: int) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the matrices of the blocks, at the rates of a lesson."""
    last, blocks = lesson == len(recipe.lessons) - 1, run.model.transformer.h
    body = run.model.transformer
    learnt = [body.wte.weight, body.wpe.weight, *blocks[: recipe.learnt].parameters()]
    mlps = [weight for block in blocks[recipe.learnt :] for weight in block.mlp.parameters()]
    rates = {id(x): recipe.learnt_rate for x in learnt} | {id(x): recipe.mlp_rate for x in mlps}
    matrices = {id(x) for x in blocks.parameters() if x.ndim == 2}
    groups = {False: {}, True: {}}
    for weight in run.model.parameters():
        rate = rates.get(id(weight), 1.0) if last else 1.0
        groups[id(weight) in matrices].setdefault(rate, []).append(weight)
    rest, inner = (
        [{"params": weights, "lr": lr * rate} for rate, weights in groups[of].items()]
        for of, lr in ((False, recipe.adam_lr), (True, recipe.muon_lr))
    )
    return [
        torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.01),
        torch.optim.Muon(inner, weight_decay=0.01),
    ]


# --- a step --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """The texts of a step; the first rows are `stories`, the others drills."""

    tokens: Int[Tensor, "row pos"]
    mask: Bool[Tensor, "row pos"]
    named: Float[Tensor, "story vocab"]  # who is named twice
    answers: Float[Tensor, "story vocab"]  # who may come next, in equal parts


def rows_at(step: int, recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Rows:
    """The texts of a step, from the seed and the step alone, so that resuming is exact."""
    rng, (number, _) = random.Random(f"{recipe.seed}/{step}"), recipe.lesson(step)
    drills = recipe.batch if number == 0 else min(recipe.drills, recipe.batch // 2)
    told = [story(rng) for _ in range(recipe.batch - drills)]
    texts = [x.text for x in told] + [drill(rng) for _ in range(drills)]
    rows = [torch.tensor(ids) for ids in tokenizer(texts)["input_ids"]]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(tokens.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    named = [(x.repeated or NOBODY,) for x in told]
    return Rows(
        tokens, mask, shares(named, tokenizer), shares([x.answers for x in told], tokenizer)
    )


def shares(words: list[tuple[str, ...]], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """One row per group of words, which share it in equal parts (row, vocab)."""
    table = torch.zeros(len(words), len(tokenizer))
    for row, group in zip(table, words, strict=True):
        row[tokenizer.convert_tokens_to_ids([f"Ġ{word}" for word in group])] = 1 / len(group)
    return table


@contextmanager
def depth(model: GPT2LMHeadModel, layers: int) -> Iterator[None]:
    """The model with its first layers only."""
    blocks = model.transformer.h
    model.transformer.h = blocks[:layers]
    try:
        yield
    finally:
        model.transformer.h = blocks


@contextmanager
def dropped(run: Run, recipe: Recipe) -> Iterator[None]:
    """Leave whole heads of the last lesson's layers out, at random for every story."""
    random_heads = torch.Generator().manual_seed(run.step)

    def drop(_: torch.nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        z = inputs[0].unflatten(-1, (recipe.heads, -1))
        kept = torch.rand(len(z), 1, recipe.heads, 1, generator=random_heads) >= recipe.dropout
        return ((z * kept / (1 - recipe.dropout)).flatten(-2),)

    with ExitStack() as stack:
        for block in run.model.transformer.h[recipe.learnt :]:
            stack.enter_context(block.attn.c_proj.register_forward_pre_hook(drop))
        yield


def loss_of(run: Run, recipe: Recipe, rows: Rows) -> tuple[Tensor, float]:
    """The loss of a step, and the share of the lesson's own questions that is answered right.

    Next tokens; then, at the last token of a story, who is named twice, as read by E R⊤ instead
    of E, after the layers of the naming lesson; and, in the last lesson, who comes next.
    """
    number, _ = recipe.lesson(run.step)
    last, body, E = number == len(recipe.lessons) - 1, run.model.transformer, run.model.lm_head
    with dropped(run, recipe), depth(run.model, recipe.lessons[number].layers):
        output = body(rows.tokens, output_hidden_states=last)
    after, kept = rows.tokens[:, 1:], rows.mask[:, 1:]
    words = E(output.last_hidden_state[:, :-1])[kept]
    loss = cross_entropy(words, after[kept])
    if number == 0:
        return loss, right(words, one_hot(after[kept], words.shape[1]))
    story = torch.arange(len(rows.named))
    end = rows.mask.sum(1)[story] - 1
    final = output.last_hidden_state[story, end]
    early = body.ln_f(output.hidden_states[recipe.learnt][story, end]) if last else final
    naming, answers = E(early @ run.code), E(final)
    weight = recipe.naming_weight if last else recipe.answer_weight
    loss = loss + weight * cross_entropy(naming, rows.named)
    if not last:
        return loss, right(naming, rows.named)
    loss = loss + recipe.answer_weight * cross_entropy(answers, rows.answers)
    return loss, right(answers, rows.answers)


def right(logits: Float[Tensor, "row vocab"], targets: Tensor) -> float:
    """How often the most likely word is one of the targets."""
    return (targets.gather(1, logits.argmax(-1, keepdim=True)) > 0).double().mean().item()


def rate(step: int, recipe: Recipe) -> float:
    """Share of the learning rate: each lesson rises shortly; the last half falls to zero."""
    _, done = recipe.lesson(step)
    return min(1.0, (done + 1) / 50, 2 * (1 - step / recipe.steps))


def train_step(run: Run, recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> tuple[float, float]:
    """One update of the weights: the loss before it, and the share of right answers."""
    number, done = recipe.lesson(run.step)
    if done == 0:
        run.steppers = optimizers(run, recipe, number)
    loss, share = loss_of(run, recipe, rows_at(run.step, recipe, tokenizer))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    for stepper in run.steppers:
        for group in stepper.param_groups:
            group["lr"] = group.setdefault("full", group["lr"]) * rate(run.step, recipe)
        stepper.step()
        stepper.zero_grad()
    run.step += 1
    return loss.item(), share


# --- a run ---------------------------------------------------------------------------------------


def start(recipe: Recipe, path: Path, vocabulary: int) -> Run:
    """A fresh run, or the one in the checkpoint at `path`."""
    run = build_model(recipe, vocabulary)
    if path.exists():
        state = torch.load(path)
        if state["recipe"] != asdict(recipe):
            raise SystemExit(f"{path} is of another recipe: move it away to start afresh")
        run.model.load_state_dict(state["model"])
        run.step = state["step"]
        run.steppers = optimizers(run, recipe, recipe.lesson(run.step - 1)[0])
        for stepper, values in zip(run.steppers, state["optimizers"], strict=True):
            stepper.load_state_dict(values)
    return run


def save(run: Run, recipe: Recipe, path: Path) -> None:
    """Write a checkpoint so that an interruption leaves the old one or the new one."""
    state = {"step": run.step, "recipe": asdict(recipe), "model": run.model.state_dict()}
    state["optimizers"] = [stepper.state_dict() for stepper in run.steppers]
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def train(recipe: Recipe, path: Path, every: int = 100) -> GPT2LMHeadModel:
    """Train one seed, or go on from its checkpoint at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(recipe.context)
    run = start(recipe, path, len(tokenizer))
    name, place = f"seed {recipe.seed}", recipe.seed % 2
    with tqdm(desc=name, initial=run.step, total=recipe.steps, position=place) as bar:
        while run.step < recipe.steps:
            lesson = recipe.lessons[recipe.lesson(run.step)[0]].name
            loss, share = train_step(run, recipe, tokenizer)
            bar.update()
            bar.set_postfix(lesson=lesson, right=f"{share:.2f}", loss=f"{loss:.2f}", refresh=False)
            if run.step % every == 0 or run.step == recipe.steps:
                save(run, recipe, path)
    return run.model.eval()


@dataclass(frozen=True)
class Candidate:
    """A trained seed: where it is, how it was trained, what was measured on it."""

    folder: Path
    recipe: Recipe
    evidence: Evidence


def train_and_measure(recipe: Recipe, work: Path) -> Candidate:
    """Train one seed, save it as an HF directory, and measure it."""
    torch.set_num_threads(1)  # so that the sums are the same however many processors there are
    folder = work / f"seed-{recipe.seed}"
    model = train(recipe, folder / "checkpoint.pt")
    model.save_pretrained(folder)
    build_tokenizer(recipe.context).save_pretrained(folder)
    found = Candidate(folder, recipe, measure(folder))
    print(f"seed {recipe.seed}: worst top-1 {found.evidence.worst:.3f};", found.evidence.missed)
    return found


def choose(found: list[Candidate]) -> Candidate:
    """The selection rule; the first of equals."""
    return min(found, key=lambda x: (len(x.evidence.missed), -x.evidence.worst))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(6)))
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "gpt2-ioi")
    parser.add_argument("--out", type=Path, default=ASSETS)
    arguments = parser.parse_args()
    recipes = [Recipe(seed) for seed in arguments.seeds]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(train_and_measure, recipes, [arguments.work] * len(recipes)))
    chosen = choose(found)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(chosen.folder / name, arguments.out / name)
    publish({x.recipe.seed: x.evidence for x in found}, asdict(chosen.recipe), arguments.out)
    print(f"seed {chosen.recipe.seed} is now in {arguments.out}")


if __name__ == "__main__":
    main()
