"""python distil.py TEACHER STUDENT TEXTS OUTPUT [--max_steps 9, or any TrainingArguments]."""

import sys
from pathlib import Path

import torch
import transformers as hf

from kd_losses import linear_kl_div_cross_entropy, response_mask


class Distiller(hf.Trainer):
    """Trains on the sum of KL from ``teacher`` and cross entropy."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The losses of a batch's predicted tokens, over their number in the whole step."""
        labels, options = inputs.pop("labels"), {"logits_to_keep": 1, "output_hidden_states": True}
        outputs = model(**inputs, **options)
        with torch.no_grad():
            teacher_states = self.teacher(**inputs, **options).hidden_states[-1]
        models = (self.accelerator.unwrap_model(model), self.teacher)
        head, teacher_head = (one.get_output_embeddings().weight for one in models)
        loss = linear_kl_div_cross_entropy(
            outputs.hidden_states[-1], head, teacher_states, labels.roll(-1, dims=-1), teacher_head,
            mask=response_mask(labels), vocab_size=min(len(head), len(teacher_head)),
            num_items=num_items_in_batch, target_num_items=num_items_in_batch,
        ).loss  # fmt: skip
        # gradients are averaged over the processes, but these are parts of one sum
        loss = loss if num_items_in_batch is None else loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


def main(teacher, student, texts, output, *options):
    """Distil, and save the student with its tokenizer."""
    parser = hf.HfArgumentParser(hf.TrainingArguments)
    (arguments,) = parser.parse_args_into_dataclasses(["--output_dir", output, *options])
    tokenizer = hf.AutoTokenizer.from_pretrained(student)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    lines = Path(texts).read_text("utf-8").splitlines()
    rows = [tokenizer(line + tokenizer.eos_token) for line in lines if line]
    collate = hf.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    model = hf.AutoModelForCausalLM.from_pretrained(student)
    trainer = Distiller(model, arguments, collate, rows, processing_class=tokenizer)
    trainer.teacher = hf.AutoModelForCausalLM.from_pretrained(teacher).to(arguments.device)
    trainer.train()
    trainer.save_model(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
