"""kNN (fallback)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from training.data.pixels import decode
from training.data.sources import pictures


def _prep(data, px, rs):
    im = Image.fromarray(decode(data).rgb)
    w, h = im.size
    s = rs / min(w, h)
    im = im.resize((max(px, round(w * s)), max(px, round(h * s))), Image.BICUBIC)
    w, h = im.size
    l, t = (w - px) // 2, (h - px) // 2
    return np.asarray(im.crop((l, t, l + px, t + px)))


class Evaluator:
    def __init__(self, config, views):
        self.c, self.v = config, views
        px = config.image_px or views.global_px
        rs = config.resize_px or round(px * 8 / 7)
        self.sets = {}
        for name, s in config.sets.items():

            def load(part, n):
                rows = [(k, l, _prep(b, px, rs)) for k, l, b in pictures(part, s.label, n)]
                return np.stack([r[2] for r in rows]), [r[1] for r in rows]

            x, y = load(s.train, s.max_train)
            if s.test is not None:
                tx, ty = load(s.test, s.max_test)
            else:
                p = np.random.default_rng(0).permutation(len(x))
                n = len(x) // 5
                tx, ty = x[p[:n]], [y[i] for i in p[:n]]
                x, y = x[p[n:]], [y[i] for i in p[n:]]
            names = sorted(set(y) | set(ty))
            ix = {n: i for i, n in enumerate(names)}
            self.sets[name] = (x, np.array([ix[a] for a in y]), tx, np.array([ix[a] for a in ty]), len(names))

    @torch.no_grad()
    def __call__(self, net):
        m = torch.tensor(self.v.mean).view(3, 1, 1)
        sd = torch.tensor(self.v.std).view(3, 1, 1)
        out = {}

        def feats(x):
            o = []
            for i in range(0, len(x), 250):
                with torch.autocast("cpu", torch.bfloat16):
                    t = net([(torch.from_numpy(x[i : i + 250]).permute(0, 3, 1, 2).float() / 255 - m) / sd])[0]
                c, p = F.normalize(t.cls.float(), dim=-1), F.normalize(t.patches.float().mean(1), dim=-1)
                o.append(torch.cat([c, p], 1))
            return torch.cat(o)

        for name, (x, y, tx, ty, n) in self.sets.items():
            a, b = feats(x), feats(tx)
            d = a.shape[1] // 2
            y = torch.from_numpy(y)
            for r, sl in (("cls", slice(0, d)), ("mean", slice(d, None)), ("cls_mean", slice(None))):
                f, g = F.normalize(a[:, sl], dim=1), F.normalize(b[:, sl], dim=1)
                s, i = (g @ f.T).topk(20)
                v = torch.zeros(len(g), n).scatter_add_(1, y[i], (s / 0.07).exp())
                out[f"knn_{name}_{r}"] = (v.argmax(1).numpy() == ty).mean().item()
        return out
