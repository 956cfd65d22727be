"""A network of the user's that answers in the form that is asked for."""

from __future__ import annotations

from torch import nn

from raydfkd.config.schema import ImageSpace, TeacherSpec
from raydfkd.networks.build import build_network


class Net(nn.Module):
    """One linear layer and an auxiliary one."""

    def __init__(self, classes=4, form="logits"):
        super().__init__()
        self.fc, self.aux, self.form = nn.Linear(64, classes), nn.Linear(64, classes), form

    def forward(self, images):
        flat = images.flatten(1)
        z = self.fc(flat)
        if self.form == "auxiliary":
            return (z, self.aux(flat)) if self.training else z
        if self.form == "two heads":
            return (z, self.aux(flat)) if self.training else z + self.aux(flat)
        if self.form == "dict":
            return {"logits": z}
        return {
            "logits": z,
            "softmax": z.softmax(1),
            "written softmax": z.exp() / z.exp().sum(1, keepdim=True),
            "log_softmax": z.log_softmax(1),
            "sigmoid": z.sigmoid(),
            "single sigmoid": z.sigmoid().squeeze(1),
            "rectified": z.sigmoid() * 1,
        }[self.form]


def spec_of(form, classes=4, outputs=4, **more):
    space = ImageSpace(channels=1, size=8, mean=(0.4,), std=(0.3,))
    options = {"form": form, "classes": outputs}
    return TeacherSpec(network="answering:Net", options=options, classes=classes, image_space=space, **more)


def build(form, **sizes):
    spec = spec_of(form, **sizes)
    return build_network(spec, spec, where="teacher", seed=0)
