"""The statistics graph against PyTorch's batch normalisation in training mode."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from shared_export import export_graph
from torch import nn

from lorac_exporters.canonical import canonicalize
from lorac_exporters.statistics_graph import statistics_graph


def network() -> nn.Sequential:
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.Conv2d(6, 4, 3, stride=2)]
    norms = [nn.BatchNorm2d(6), nn.BatchNorm2d(4, eps=1e-3)]
    for norm in norms:
        nn.init.uniform_(norm.weight, -1.0, 2.0)
        nn.init.normal_(norm.bias)
    return nn.Sequential(
        convs[0],
        norms[0],
        nn.ReLU(),
        convs[1],
        norms[1],
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def test_batch_statistics_are_pytorchs_and_nothing_behind_the_last_bn_is_kept() -> None:
    net = network()
    graph = export_graph(net, (3, 8, 8))
    batchnorms = canonicalize(graph).batchnorms
    model = statistics_graph(canonicalize(graph, fold=False).model, batchnorms)
    assert "Gemm" not in {node.op_type for node in model.graph}
    images = np.random.default_rng(0).standard_normal((5, 3, 8, 8)).astype(np.float32)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    names = [o.name for o in session.get_outputs()]
    found = dict(zip(names, session.run(None, {"input": images}), strict=True))
    assert names == ["1.batch_mean", "1.batch_var", "4.batch_mean", "4.batch_var"]
    net.train()
    for module in (net[1], net[4]):
        module.momentum = 1.0  # running statistics become the batch's
    net(torch.from_numpy(images))
    for index in (1, 4):
        positions = 5 * batchnorms[0 if index == 1 else 1].positions
        unbiased = found[f"{index}.batch_var"] * positions / (positions - 1)
        np.testing.assert_allclose(found[f"{index}.batch_mean"], net[index].running_mean.numpy(), atol=1e-6)
        np.testing.assert_allclose(unbiased, net[index].running_var.numpy(), rtol=1e-5)
