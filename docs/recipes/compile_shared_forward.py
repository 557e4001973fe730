"""``torch.compile`` of one forward that all losses share.

Compiling joins their graphs: every loss seems to reach every parameter, with zeros. ``scope`` says
what is really shared; what a whole batch lacks is left out, or momentum and decay would move it.
Buffers must not be donated to the first of several backwards: delete caches from before that.
"""

import torch._functorch.config
from torch.nn.functional import mse_loss
from torch.optim import AdamW
from torch.utils.data import DataLoader
from your_model import Model, samples

from gradsplit import ModalityDecoupledOptimizer


def train(model, samples):
    @torch.compile
    def scores(**inputs):
        features = {name: model.encoders[name](values) for name, values in inputs.items()}
        if len(features) == 2:
            features["text+audio"] = (features["text"] + features["audio"]) / 2
        return {name: model.head(one).squeeze(-1) for name, one in features.items()}

    torch._functorch.config.donated_buffer = False
    base = AdamW(model.parameters(), lr=1e-2)
    opt = ModalityDecoupledOptimizer(base, scope=model.head.parameters())
    for batch in DataLoader(samples, batch_size=8):
        target, has_audio = batch["target"], batch["has_audio"]
        present = ("text", "audio") if has_audio.any() else ("text",)
        losses = dict.fromkeys(("text", "audio", "text+audio"))
        for name, score in scores(**{name: batch[name] for name in present}).items():
            has = ... if name == "text" else has_audio
            losses[name] = mse_loss(score[has], target[has])
        opt.step(losses)
    return opt


if __name__ == "__main__":
    print(train(Model(), samples()).last)
