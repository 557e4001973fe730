"""peft: LoRA adapters, decoupled.

Only the adapters require gradients; give the base those alone. What is frozen is in no row, so rows
are as small as the adapters.
"""

from peft import LoraConfig, get_peft_model
from torch.optim import AdamW
from torch.utils.data import DataLoader
from your_model import Model, samples

from gradsplit import ModalityDecoupledOptimizer

CONFIG = LoraConfig(r=4, target_modules=["text", "audio", "head.1", "head.3"])


def train(model, samples):
    model = get_peft_model(model, CONFIG)
    base = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    opt = ModalityDecoupledOptimizer(base)
    for batch in DataLoader(samples, batch_size=8):
        opt.step(model(**batch))
    return opt


if __name__ == "__main__":
    print(train(Model(), samples()).last)
