"""Networks as strangers may bring them, written without raydfkd in mind; strangers.py copies this file for each."""

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, before, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.short = nn.Conv2d(before, width, 1, stride, bias=False)

    def forward(self, x):
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + self.short(x))


def residual():
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, 1, 1), nn.BatchNorm2d(32), nn.ReLU(), Block(32, 32, 1), Block(32, 64, 2)),
        *(Block(64, 128, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(128, 10)),
    )


def tanh():
    return nn.Sequential(
        *(nn.Conv2d(1, 20, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(20, 50, 3), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(200, 100), nn.Tanh(), nn.Linear(100, 10)),
    )


def strided(width=32):
    return nn.Sequential(
        *(nn.Conv2d(1, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU()),
        *(nn.Conv2d(2 * width, 4 * width, 3, 1, 1, bias=False), nn.BatchNorm2d(4 * width), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)),
    )


def pooled(width=16):
    return nn.Sequential(
        *(nn.Conv2d(1, width, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(width, 2 * width, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(72 * width, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def linear():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def linear_norm():
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(784, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Dropout(0.2)),
        *(nn.Linear(256, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10)),
    )


def logarithms():
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)),
        *(nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10), nn.LogSoftmax(1)),
    )


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(28, 96, batch_first=True)
        self.fc = nn.Linear(96, 10)

    def forward(self, x):
        out, _ = self.lstm(x.squeeze(1))
        return self.fc(out[:, -1])


class Norm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Mix(nn.Module):
    def __init__(self, w):
        super().__init__()
        self.dw = nn.Conv2d(w, w, 5, padding=2, groups=w)
        self.norm = Norm(w)
        self.up, self.down = nn.Conv2d(w, 3 * w, 1), nn.Conv2d(3 * w, w, 1)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(self.dw(x)))))


def mixing():
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 4, 4), Norm(32), Mix(32), Mix(32)),
        *(Norm(32), nn.Conv2d(32, 64, 2, 2), Mix(64), Mix(64)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 10)),
    )


def instance():
    return nn.Sequential(
        *(nn.Conv2d(1, 24, 3, 1, 1), nn.InstanceNorm2d(24, affine=True), nn.PReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(24, 48, 3, 1, 1), nn.InstanceNorm2d(48, affine=True), nn.PReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(48, 64, 3, 1, 1), nn.PReLU(), nn.Flatten(), nn.Linear(64 * 49, 10)),
    )
