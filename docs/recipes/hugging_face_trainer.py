"""The Hugging Face Trainer: ``compute_loss`` returns ``joint``.

``loss_is_scaled_for_ga = False`` lets the Trainer divide by the micro-batches of a step.
``evaluate()`` gives the mean loss once ``label_names`` has a key of the batch;
``train(resume_from_checkpoint=True)`` resumes. ``module`` is for several processes. To let the
Trainer make the base, wrap it in ``create_optimizer``.
"""

from torch.optim import AdamW
from transformers import Trainer, TrainingArguments
from your_model import Model, samples

from gradsplit import ModalityDecoupledOptimizer


class JointTrainer(Trainer):
    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        opt = self.optimizer.optimizer
        opt.module = self.model_wrapped
        loss = opt.joint(model(**inputs))
        return (loss, {"loss": loss}) if return_outputs else loss


def train(model, samples):
    opt = ModalityDecoupledOptimizer(AdamW(model.parameters(), lr=1e-2))
    window = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    arguments = TrainingArguments(
        num_train_epochs=1, train_sampling_strategy="sequential", label_names=["target"], **window
    )
    data = {"train_dataset": samples, "eval_dataset": samples}
    trainer = JointTrainer(model, arguments, optimizers=(opt, None), **data)
    trainer.train()
    print(trainer.evaluate())
    return opt


if __name__ == "__main__":
    print(train(Model(), samples()).last)
