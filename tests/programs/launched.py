"""A program that knows nothing of flexpatch: loads models in several ways, runs and trains them. It ends with code 7.

python -m flexpatch.launch tests/programs/launched.py FOLDER        # of a model
"""

import copy
import subprocess
import sys
from multiprocessing import get_context

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

BATCH = torch.cat([torch.arange(200).expand(4, -1), 7 * torch.arange(20).view(4, 5)], dim=1) % 151


def train(model: nn.Module, reference: nn.Module) -> None:
    from datasets import Dataset  # here: the processes that train nothing start sooner
    from transformers import Trainer, TrainingArguments

    class WithReference(Trainer):
        """Trains a model beside one that is not trained, as DPO does."""

        def compute_loss(self, model: nn.Module, inputs: dict, **_: object) -> torch.Tensor:
            with torch.no_grad():
                reference = self.reference(**inputs, use_cache=False).loss
            return model(**inputs).loss - reference

    settings = TrainingArguments(
        "out", max_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = WithReference(
        model, settings, train_dataset=Dataset.from_dict(dict(input_ids=BATCH.tolist(), labels=BATCH.tolist()))
    )
    trainer.reference = reference
    trainer.train()


def load_and_run(folder: str) -> None:
    AutoModelForCausalLM.from_pretrained(folder)(BATCH, use_cache=False)


if __name__ == "__main__":
    folder, *role = sys.argv[1:]
    load_and_run(folder)
    if not role:
        from peft import LoraConfig, get_peft_model

        config = AutoConfig.from_pretrained(folder)
        AutoModelForCausalLM.from_config(copy.deepcopy(config))(BATCH, use_cache=False)
        AutoModelForCausalLM.from_config(
            AutoConfig.for_model("nanochat", num_hidden_layers=1, hidden_size=32, num_attention_heads=2)
        )
        train(LlamaForCausalLM(config), LlamaForCausalLM(config))
        adapted = get_peft_model(
            AutoModelForCausalLM.from_pretrained(folder), LoraConfig(lora_dropout=0.5, task_type="CAUSAL_LM")
        )
        train(adapted, LlamaForCausalLM(config))
        subprocess.run([sys.executable, __file__, folder, "started"], check=False)
        process = get_context("spawn").Process(target=load_and_run, args=(folder,))
        process.start()
        process.join()
    sys.exit(7)
