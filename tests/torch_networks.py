"""The networks of CRD's benchmark and of ImageNet in torch, an oracle: `built(torch, name)`.

Written from the papers' descriptions, with the names of layers that the published codes have. Each
returns (logits, features), the features by the names that abkd_jax gives them.
"""

VGG_LAYERS = {
    8: [[64], [128], [256], [512], [512]],
    11: [[64], [128], [256] * 2, [512] * 2, [512] * 2],
    13: [[64] * 2, [128] * 2, [256] * 2, [512] * 2, [512] * 2],
    16: [[64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3],
    19: [[64] * 2, [128] * 2, [256] * 4, [512] * 4, [512] * 4],
}


def built(torch, kind, num_classes, **options):
    """A torch module with every number drawn, running statistics included."""
    torch.manual_seed(0)
    network = globals()[kind](torch, num_classes, **options)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.3)
            torch.nn.init.normal_(module.running_mean, std=0.3)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network


def chain(torch, *modules):
    return torch.nn.Sequential(*modules)


def conv(torch, width_in, width, size, stride=1, groups=1, bias=False):
    pad = (size - 1) // 2
    return torch.nn.Conv2d(width_in, width, size, stride, pad, groups=groups, bias=bias)


def norm(torch, width):
    return torch.nn.BatchNorm2d(width)


def network(torch, parts, forward):
    """A module with the parts by name; a dotted name goes into a module of modules."""

    class Network(torch.nn.Module):
        def forward(self, x):
            return forward(self, x)

    made = Network()
    for name, part in parts.items():
        made.add_module(name, part)
    return made


def residual(torch, num_classes, depths, widths, bottleneck=False, large=False, names=None):
    """Residual networks with the names of torchvision, or of `names` = (shortcut, last)."""
    shortcut_name, last = names or ("downsample", "fc")
    expansion = 4 if bottleneck else 1

    def block(width_in, width, stride):
        sizes = [(width_in, width, 3, stride), (width, width, 3, 1)]
        if bottleneck:
            sizes = [(width_in, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)]
        parts = {}
        for index, size in enumerate(sizes, start=1):
            parts |= {f"conv{index}": conv(torch, *size), f"bn{index}": norm(torch, size[1])}
        if stride > 1 or width_in != width * expansion:
            parts[shortcut_name] = chain(
                torch,
                conv(torch, width_in, width * expansion, 1, stride),
                norm(torch, width * expansion),
            )

        def forward(self, x):
            y = x
            for index in range(1, len(sizes) + 1):
                y = torch.relu(y) if index > 1 else y
                y = getattr(self, f"bn{index}")(getattr(self, f"conv{index}")(y))
            side = getattr(self, shortcut_name)(x) if hasattr(self, shortcut_name) else x
            return y + side

        return network(torch, parts, forward)

    stem, *stages = widths
    parts = {"conv1": conv(torch, 3, stem, 7 if large else 3, 2 if large else 1)}
    parts["bn1"] = norm(torch, stem)
    current = stem
    for stage, (width, depth) in enumerate(zip(stages, depths, strict=True)):
        blocks = []
        for index in range(depth):
            blocks.append(block(current, width, 2 if stage and not index else 1))
            current = width * expansion
        parts[f"layer{stage + 1}"] = chain(torch, *blocks)
    parts[last] = torch.nn.Linear(current, num_classes)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        features = {"stem": x}
        x = torch.nn.functional.max_pool2d(x, 3, 2, 1) if large else x
        for stage in range(len(stages)):
            for each in getattr(self, f"layer{stage + 1}"):
                before = each(x)
                x = torch.relu(before)
            features |= {f"stage{stage}": x, f"stage{stage}_preactivation": before}
        return getattr(self, last)(x.mean((2, 3))), features

    return network(torch, parts, forward)


def wide(torch, num_classes, depth, widening):
    """Wide residual networks."""
    widths = [16, 16 * widening, 32 * widening, 64 * widening]

    def block(width_in, width, stride):
        parts = {
            "bn1": norm(torch, width_in),
            "conv1": conv(torch, width_in, width, 3, stride),
            "bn2": norm(torch, width),
            "conv2": conv(torch, width, width, 3),
        }
        if width_in != width:
            parts["convShortcut"] = conv(torch, width_in, width, 1, stride)

        def forward(self, x):
            active = torch.relu(self.bn1(x))
            y = self.conv2(torch.relu(self.bn2(self.conv1(active))))
            return y + (self.convShortcut(active) if width_in != width else x)

        return network(torch, parts, forward)

    parts, current = {"conv1": conv(torch, 3, 16, 3)}, 16
    for stage, width in enumerate(widths[1:], start=1):
        blocks = []
        for index in range((depth - 4) // 6):
            blocks.append(block(current, width, 2 if stage > 1 and not index else 1))
            current = width
        layer = network(torch, {"layer": chain(torch, *blocks)}, lambda self, x: self.layer(x))
        parts[f"block{stage}"] = layer
    parts |= {"bn1": norm(torch, current), "fc": torch.nn.Linear(current, num_classes)}

    def forward(self, x):
        x = self.conv1(x)
        features = {"stem": x}
        for stage in range(3):
            x = getattr(self, f"block{stage + 1}")(x)
            after = self.bn1 if stage == 2 else getattr(self, f"block{stage + 2}").layer[0].bn1
            features |= {f"stage{stage}": x}
            if not self.training:  # a second call would move the statistics twice
                features[f"stage{stage}_preactivation"] = after(x)
        return self.fc(torch.relu(self.bn1(x)).mean((2, 3))), features

    return network(torch, parts, forward)


def vgg(torch, num_classes, depth):
    """VGG."""
    parts, current = {}, 3
    for stage, widths in enumerate(VGG_LAYERS[depth]):
        layers = []
        for width in widths:
            layers += [conv(torch, current, width, 3, bias=True), norm(torch, width)]
            layers += [torch.nn.ReLU()]
            current = width
        parts[f"block{stage}"] = chain(torch, *layers[:-1])
    parts["classifier"] = torch.nn.Linear(512, num_classes)

    def forward(self, x):
        tall, features = x.shape[2] == 64, {}
        for stage in range(5):
            before = getattr(self, f"block{stage}")(x)
            x = torch.relu(before)
            features |= {f"stage{stage}": x, f"stage{stage}_preactivation": before}
            x = torch.nn.functional.max_pool2d(x, 2) if stage < 3 or (stage == 3 and tall) else x
        return self.classifier(x.mean((2, 3))), features

    return network(torch, parts, forward)


def mobile_1(torch, num_classes):
    """MobileNet."""
    relu = torch.nn.ReLU
    widths = [64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024]
    halving = (1, 3, 5, 11)
    layers = [chain(torch, conv(torch, 3, 32, 3, 2), norm(torch, 32), relu())]
    current = 32
    for index, width in enumerate(widths):
        depthwise = conv(torch, current, current, 3, 2 if index in halving else 1, groups=current)
        first = [depthwise, norm(torch, current), relu()]
        layers.append(chain(torch, *first, conv(torch, current, width, 1), norm(torch, width)))
        current = width
    parts = {"model": chain(torch, *layers), "fc": torch.nn.Linear(1024, num_classes)}

    def forward(self, x):
        x = self.model[0](x)
        features, stage = {"stem": x}, 0
        for index in range(13):
            before = self.model[index + 1](x)
            x = torch.relu(before)
            if index in (2, 4, 10, 12):
                features |= {f"stage{stage}": x, f"stage{stage}_preactivation": before}
                stage += 1
        return self.fc(x.mean((2, 3))), features

    return network(torch, parts, forward)


def mobile_2(torch, num_classes, width=0.5, expansion=6):
    """MobileNetV2."""
    relu, groups, current = torch.nn.ReLU, [], int(32 * width)
    parts = {"conv1": chain(torch, conv(torch, 3, current, 3, 2), norm(torch, current), relu())}
    table = [(1, 16, 1, 1), (expansion, 24, 2, 1), (expansion, 32, 3, 2), (expansion, 64, 4, 2)]
    table += [(expansion, 96, 3, 1), (expansion, 160, 3, 2), (expansion, 320, 1, 1)]
    for factor, channels, count, first_stride in table:
        blocks, out = [], int(channels * width)
        for index in range(count):
            stride, inner = 1 if index else first_stride, current * factor
            layers = [conv(torch, current, inner, 1), norm(torch, inner), relu()]
            layers += [conv(torch, inner, inner, 3, stride, inner), norm(torch, inner), relu()]
            layers += [conv(torch, inner, out, 1), norm(torch, out)]
            adds = stride == 1 and current == out
            blocks.append(
                network(
                    torch,
                    {"conv": chain(torch, *layers)},
                    lambda self, x, adds=adds: self.conv(x) + x if adds else self.conv(x),
                )
            )
            current = out
        groups.append(chain(torch, *blocks))
    last = int(1280 * max(width, 1.0))
    parts["blocks"] = torch.nn.ModuleList(groups)
    parts["conv2"] = chain(torch, conv(torch, current, last, 1), norm(torch, last), relu())
    parts["classifier"] = chain(torch, torch.nn.Linear(last, num_classes))

    def forward(self, x):
        x = self.conv1(x)
        features, stage = {"stem": x}, 0
        for index in range(7):
            x = self.blocks[index](x)
            if index in (1, 2, 4, 6):
                features[f"stage{stage}"] = x
                stage += 1
        return self.classifier(self.conv2(x).mean((2, 3))), features

    return network(torch, parts, forward)


def shuffle_1(torch, num_classes):
    """ShuffleNet."""

    def block(width_in, width, halves):
        width = width - width_in if halves else width
        inner, groups = width // 4, 1 if width_in == 24 else 3
        parts = {
            "conv1": conv(torch, width_in, inner, 1, groups=groups),
            "bn1": norm(torch, inner),
            "conv2": conv(torch, inner, inner, 3, 2 if halves else 1, inner),
            "bn2": norm(torch, inner),
            "conv3": conv(torch, inner, width, 1, groups=3),
            "bn3": norm(torch, width),
        }

        def forward(self, x):
            y = torch.channel_shuffle(torch.relu(self.bn1(self.conv1(x))), groups)
            y = self.bn3(self.conv3(torch.relu(self.bn2(self.conv2(y)))))
            if not halves:
                return y + x
            return torch.cat([y, torch.nn.functional.avg_pool2d(x, 3, 2, 1)], 1)

        return network(torch, parts, forward)

    parts, current = {"conv1": conv(torch, 3, 24, 1), "bn1": norm(torch, 24)}, 24
    for stage, (width, count) in enumerate([(240, 4), (480, 8), (960, 4)], start=1):
        blocks = [block(current if not i else width, width, i == 0) for i in range(count)]
        parts[f"layer{stage}"], current = chain(torch, *blocks), width
    parts["linear"] = torch.nn.Linear(960, num_classes)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        features = {"stem": x}
        for stage in range(3):
            for each in getattr(self, f"layer{stage + 1}"):
                before = each(x)
                x = torch.relu(before)
            features |= {f"stage{stage}": x, f"stage{stage}_preactivation": before}
        return self.linear(x.mean((2, 3))), features

    return network(torch, parts, forward)


def shuffle_2(torch, num_classes, widths=(116, 232, 464, 1024)):
    """ShuffleNetV2."""

    def split(width):
        half = width // 2
        parts = {
            "conv1": conv(torch, half, half, 1),
            "bn1": norm(torch, half),
            "conv2": conv(torch, half, half, 3, 1, half),
            "bn2": norm(torch, half),
            "conv3": conv(torch, half, half, 1),
            "bn3": norm(torch, half),
        }

        def forward(self, x):
            passing, y = x.chunk(2, 1)
            y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(y)))))
            y = self.bn3(self.conv3(y))
            self.before = torch.cat([passing, y], 1)
            return torch.channel_shuffle(torch.cat([passing, torch.relu(y)], 1), 2)

        return network(torch, parts, forward)

    def halving(width_in, width):
        half, parts = width // 2, {}
        sizes = [(width_in, width_in, 3, 2, width_in), (width_in, half, 1)]
        sizes += [(width_in, half, 1), (half, half, 3, 2, half), (half, half, 1)]
        for index, size in enumerate(sizes, start=1):
            parts |= {f"conv{index}": conv(torch, *size), f"bn{index}": norm(torch, size[1])}

        def forward(self, x):
            left = torch.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
            y = self.bn4(self.conv4(torch.relu(self.bn3(self.conv3(x)))))
            y = torch.relu(self.bn5(self.conv5(y)))
            return torch.channel_shuffle(torch.cat([left, y], 1), 2)

        return network(torch, parts, forward)

    parts, current = {"conv1": conv(torch, 3, 24, 1), "bn1": norm(torch, 24)}, 24
    for stage, (width, count) in enumerate(zip(widths[:3], (3, 7, 3), strict=True), start=1):
        blocks = [halving(current, width), *[split(width) for _ in range(count)]]
        parts[f"layer{stage}"], current = chain(torch, *blocks), width
    parts |= {"conv2": conv(torch, current, widths[3], 1), "bn2": norm(torch, widths[3])}
    parts["linear"] = torch.nn.Linear(widths[3], num_classes)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        features = {"stem": x}
        for stage in range(3):
            layer = getattr(self, f"layer{stage + 1}")
            x = layer(x)
            features |= {f"stage{stage}": x, f"stage{stage}_preactivation": layer[-1].before}
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.linear(x.mean((2, 3))), features

    return network(torch, parts, forward)
