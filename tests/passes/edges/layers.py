"""Message passing of every kind: PyG's layers, its utilities, and models of one's own, from 6 features to 8."""

import torch
from torch import nn
from torch.nn import functional as F
from torch_geometric import nn as pyg
from torch_geometric.utils import scatter, segment, softmax

FEATURES, WIDTH, EDGE = 6, 8, 3  # in, out, of an edge


class Own(pyg.MessagePassing):
    """A layer of one's own: its message is any function of both ends and the edge."""

    def __init__(self, message, **options):
        super().__init__(**options)
        self.function, self.first = message, nn.Linear(FEATURES, WIDTH)
        self.edge = nn.Linear(EDGE, WIDTH)

    def forward(self, x, edge_index, edge_attr):
        return self.propagate(edge_index, x=self.first(x), e=self.edge(edge_attr))

    def message(self, x_i, x_j, e):
        return self.function(x_i, x_j, e)


def mlp(size_in, size_out=WIDTH):
    return nn.Sequential(nn.Linear(size_in, WIDTH), nn.ReLU(), nn.Linear(WIDTH, size_out))


class Learned(Own):
    """A layer whose message is a module's of both ends and the edge."""

    def __init__(self, module, **options):
        super().__init__(None, **options)
        self.function = module


class MLPOf(nn.Module):
    """Layers on what a function makes of both ends and the edge."""

    def __init__(self, function, *layers):
        super().__init__()
        self.function, self.layers = function, nn.Sequential(*layers)

    def forward(self, *rows):
        return self.layers(self.function(*rows))


class Filtered(nn.Module):
    """A sum of neighbours, each times a filter made of the edge, as SchNet's."""

    def __init__(self):
        super().__init__()
        self.first, self.filter = nn.Linear(FEATURES, WIDTH), mlp(EDGE)
        self.filter[1] = nn.Softplus()

    def forward(self, x, edge_index, edge_attr):
        filters, x = self.filter(edge_attr), self.first(x)
        return torch.zeros_like(x).index_add(0, edge_index[1], x[edge_index[0]] * filters)


class Mesh(nn.Module):
    """Two layers that update edges and nodes, with LayerNorm and residual sums, as MeshGraphNets."""

    def __init__(self):
        super().__init__()
        self.nodes, self.edges = nn.Linear(FEATURES, WIDTH), nn.Linear(EDGE, WIDTH)
        self.on_edges = nn.ModuleList(nn.Sequential(mlp(3 * WIDTH), nn.LayerNorm(WIDTH)) for _ in range(2))
        self.on_nodes = nn.ModuleList(nn.Sequential(mlp(2 * WIDTH), nn.LayerNorm(WIDTH)) for _ in range(2))

    def forward(self, x, edge_index, edge_attr):
        x, e = self.nodes(x), self.edges(edge_attr)
        for on_edges, on_nodes in zip(self.on_edges, self.on_nodes, strict=True):
            e = e + on_edges(torch.cat([x[edge_index[0]], x[edge_index[1]], e], -1))
            x = x + on_nodes(torch.cat([x, scatter(e, edge_index[1], 0, x.shape[0])], -1))
        return x


class Decoder(nn.Module):
    """One number for each edge, from a layer's rows of both ends."""

    def __init__(self):
        super().__init__()
        self.layer, self.score = pyg.SAGEConv(FEATURES, WIDTH), mlp(2 * WIDTH, 1)

    def forward(self, x, edge_index, edge_attr):
        x = self.layer(x, edge_index)
        return self.score(torch.cat([x[edge_index[0]], x[edge_index[1]]], -1)) * edge_attr[:, :1]


class Plain(nn.Module):
    """Message passing without PyG."""

    def __init__(self, function):
        super().__init__()
        self.function, self.first = function, nn.Linear(FEATURES, WIDTH)

    def forward(self, x, edge_index, edge_attr):
        return self.function(self.first(x), edge_index, edge_attr)


class Pooled(nn.Module):
    """A layer and a readout of the graphs of a batch."""

    def __init__(self, pool):
        super().__init__()
        self.layer, self.last, self.pool = pyg.GraphConv(FEATURES, WIDTH), nn.Linear(WIDTH, WIDTH), pool

    def forward(self, x, edge_index, batch):
        return self.last(self.pool(self.layer(x, edge_index).relu(), batch, 4))


class Deep(nn.Module):
    """Layers, norms, ReLU."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.norm, self.second = first, nn.BatchNorm1d(WIDTH), second

    def forward(self, x, *graph):
        return self.second(self.norm(self.first(x, *graph)).relu(), *graph)


def attention_by_hand(x, edge_index, _):
    score = (x[edge_index[0]] * x[edge_index[1]]).sum(-1) / 3
    weight = softmax(score, edge_index[1], num_nodes=x.shape[0])
    return scatter(weight.unsqueeze(-1) * x[edge_index[0]], edge_index[1], 0, x.shape[0], reduce="sum")


def index_add(x, edge_index, _):
    return torch.zeros_like(x).index_add(0, edge_index[1], x[edge_index[0]].sin())


def segments(x, edge_index, _):
    row = edge_index[1].sort().values
    pointer = torch.searchsorted(row, torch.arange(x.shape[0] + 1))
    return segment(x[edge_index[0]] * 2, pointer, reduce="sum")


def scatter_of(reduce):
    def function(x, edge_index, _):
        message = F.relu(x[edge_index[0]] - x[edge_index[1]])
        return scatter(message, edge_index[1], 0, x.shape[0], reduce=reduce)

    return function


def edge_scores(x, edge_index, edge_attr):
    """A decoder of edges: one number each, and no sum over nodes."""
    return (x[edge_index[0]] * x[edge_index[1]]).sum(-1) * edge_attr[:, 0]


def distances(x, edge_index, _):
    away = x[edge_index[0]] - x[edge_index[1]]
    return torch.zeros_like(x).index_add(0, edge_index[1], away * torch.exp(-away.square().sum(-1, keepdim=True)))


IN = FEATURES
LAYERS = {  # name -> layer; what it takes beside x and edges: "", "weight" (edges), or "attr" (edges, EDGE)
    **{
        f"SAGE {aggr}": (lambda aggr=aggr: pyg.SAGEConv(IN, WIDTH, aggr=aggr), "")
        for aggr in ("mean", "max", "min", "sum")
    },
    "GCN": (lambda: pyg.GCNConv(IN, WIDTH), ""),
    "GCN without self-loops": (lambda: pyg.GCNConv(IN, WIDTH, add_self_loops=False), ""),
    "GCN weighted": (lambda: pyg.GCNConv(IN, WIDTH, add_self_loops=False), "weight"),
    "GraphConv weighted": (lambda: pyg.GraphConv(IN, WIDTH), "weight"),
    "GIN": (lambda: pyg.GINConv(mlp(IN), train_eps=True), ""),
    "GINE": (lambda: pyg.GINEConv(mlp(IN), edge_dim=EDGE), "attr"),
    "GAT": (lambda: pyg.GATConv(IN, WIDTH), ""),
    "GAT without self-loops": (lambda: pyg.GATConv(IN, WIDTH, add_self_loops=False), ""),
    "GAT 2 heads": (lambda: pyg.GATConv(IN, 4, heads=2, dropout=0.5, add_self_loops=False), ""),
    "GAT 2 heads averaged": (lambda: pyg.GATConv(IN, WIDTH, heads=2, concat=False), ""),
    "GAT 1 column": (lambda: pyg.GATConv(IN, 1, heads=3, add_self_loops=False), ""),
    "GAT 1 head 1 column": (lambda: pyg.GATConv(IN, 1, add_self_loops=False), ""),
    "GAT edges": (lambda: pyg.GATConv(IN, 4, heads=2, edge_dim=EDGE, add_self_loops=False), "attr"),
    "GATv2": (lambda: pyg.GATv2Conv(IN, 4, heads=2, add_self_loops=False), ""),
    "GATv2 1 head": (lambda: pyg.GATv2Conv(IN, WIDTH, add_self_loops=False), ""),
    "GATv2 1 column": (lambda: pyg.GATv2Conv(IN, 1, heads=2, add_self_loops=False), ""),
    "GATv2 edges": (lambda: pyg.GATv2Conv(IN, 4, heads=2, edge_dim=EDGE, dropout=0.3, add_self_loops=False), "attr"),
    "GATv2 shared": (lambda: pyg.GATv2Conv(IN, 4, heads=2, share_weights=True), ""),
    "Transformer": (lambda: pyg.TransformerConv(IN, 4, heads=2), ""),
    "Transformer edges": (lambda: pyg.TransformerConv(IN, 4, heads=2, edge_dim=EDGE, dropout=0.3, beta=True), "attr"),
    "SuperGAT": (lambda: pyg.SuperGATConv(IN, 4, heads=2, is_undirected=True, add_self_loops=False), ""),
    "AGNN": (lambda: pyg.AGNNConv(add_self_loops=False), ""),
    "EdgeConv": (lambda: pyg.EdgeConv(mlp(2 * IN)), ""),
    "CGConv": (lambda: pyg.CGConv(IN, EDGE), "attr"),
    "ResGated": (lambda: pyg.ResGatedGraphConv(IN, WIDTH, edge_dim=EDGE), "attr"),
    "General": (lambda: pyg.GeneralConv(IN, WIDTH, in_edge_channels=EDGE, attention=True, heads=2), "attr"),
    "PNA": (
        lambda: pyg.PNAConv(
            IN, WIDTH, ["mean", "max", "std"], ["identity", "amplification"], torch.tensor([1, 3, 5, 2])
        ),
        "",
    ),
    "NNConv": (lambda: pyg.NNConv(IN, WIDTH, nn.Linear(EDGE, IN * WIDTH)), "attr"),
    "TAG": (lambda: pyg.TAGConv(IN, WIDTH, K=2), ""),
    "SG": (lambda: pyg.SGConv(IN, WIDTH, K=2, add_self_loops=False), ""),
    "Cheb": (lambda: pyg.ChebConv(IN, WIDTH, K=3), ""),
    "FiLM": (lambda: pyg.FiLMConv(IN, WIDTH), ""),
    "LE": (lambda: pyg.LEConv(IN, WIDTH), "weight"),
    "Arma": (lambda: pyg.ARMAConv(IN, WIDTH, num_stacks=2, num_layers=2), ""),
    "MF": (lambda: pyg.MFConv(IN, WIDTH), ""),
    "GMM": (lambda: pyg.GMMConv(IN, WIDTH, dim=EDGE, kernel_size=2), "attr"),
    "Feast": (lambda: pyg.FeaStConv(IN, WIDTH, heads=2, add_self_loops=False), ""),
    "softmax aggregation": (lambda: pyg.SAGEConv(IN, WIDTH, aggr=pyg.SoftmaxAggregation(learn=True)), ""),
    "power mean": (lambda: Own(lambda i, j, e: j.sigmoid() + 0.5, aggr=pyg.PowerMeanAggregation(learn=True)), "attr"),
    "several": (lambda: pyg.SAGEConv(IN, WIDTH, aggr=["mean", "max", "var"]), ""),
    "own relu": (lambda: Own(lambda i, j, e: F.relu(i - j + e), aggr="max"), "attr"),
    "own gate": (lambda: Own(lambda i, j, e: torch.sigmoid(i * e) * F.silu(j), aggr="mean"), "attr"),
    "own clamp": (lambda: Own(lambda i, j, e: (i - j).clamp(-1, 1) * e.tanh(), aggr="min"), "attr"),
    "own gelu": (lambda: Own(lambda i, j, e: F.gelu(i) * F.softplus(j) + F.elu(e), aggr="sum"), "attr"),
    "own norm": (lambda: Own(lambda i, j, e: F.normalize(i - 2 * j, dim=-1) * e, aggr="sum"), "attr"),
    "own softmax": (lambda: Own(lambda i, j, e: torch.softmax(i + e, -1) * j, aggr="sum"), "attr"),
    "own reversed": (lambda: Own(lambda i, j, e: i.abs() * j + e.exp(), aggr="sum", flow="target_to_source"), "attr"),
    "own views": (
        lambda: Own(
            lambda i, j, e: (i.view(-1, 2, 4) * j.view(-1, 2, 4).sum(-1, keepdim=True)).view(-1, 8) + e, aggr="sum"
        ),
        "attr",
    ),
    "own across": (lambda: Own(lambda i, j, e: (F.relu((i + j).view(-1)) * 2).view(-1, 8), aggr="sum"), "attr"),
    "EdgeConv mean": (lambda: pyg.EdgeConv(mlp(2 * IN), aggr="mean"), ""),
    "EdgeConv sum": (lambda: pyg.EdgeConv(mlp(2 * IN, 5), aggr="sum"), ""),
    "learned": (lambda: Learned(MLPOf(lambda i, j, e: j, nn.Linear(WIDTH, WIDTH)), aggr="mean"), "attr"),
    "learned of edges": (
        lambda: Learned(MLPOf(lambda i, j, e: torch.cat([i, j, e], -1), *mlp(3 * WIDTH, 19)), aggr="max"),
        "attr",
    ),
    "learned of three": (
        lambda: Learned(
            MLPOf(
                lambda i, j, e: torch.cat([(i - j).square().sum(-1, keepdim=True), j, e[:, :2]], -1),
                *[nn.Linear(WIDTH + 3, 17), nn.SiLU(), nn.Linear(17, 9), nn.SiLU(), nn.Linear(9, WIDTH), nn.SiLU()],
            ),
            aggr="sum",
        ),
        "attr",
    ),
    "learned of a difference": (
        lambda: Learned(MLPOf(lambda i, j, e: torch.cat([j - i, e], -1), *mlp(2 * WIDTH)), aggr="max"),
        "attr",
    ),
    "learned with a norm": (
        lambda: Learned(MLPOf(lambda i, j, e: i + j, nn.Linear(WIDTH, 12), nn.BatchNorm1d(12), nn.ReLU())),
        "attr",
    ),
    "filtered": (Filtered, "attr"),
    "mesh": (Mesh, "attr"),
    "decoder": (Decoder, "attr"),
    "PNA edges": (
        lambda: pyg.PNAConv(
            IN, WIDTH, ["mean", "min"], ["identity"], torch.tensor([1, 3, 5, 2]), edge_dim=EDGE, towers=2, pre_layers=2
        ),
        "attr",
    ),
    **{
        f"PNA {towers} towers": (
            lambda towers=towers: pyg.PNAConv(
                IN, 6, ["mean", "min"], ["identity"], torch.tensor([1, 3, 5, 2]), towers=towers
            ),
            "",
        )
        for towers in (1, 2, 3)
    },
    "PNA divided": (
        lambda: pyg.PNAConv(IN, 6, ["sum", "std"], ["linear"], torch.tensor([1, 3, 5, 2]), towers=3, divide_input=True),
        "",
    ),
    "two EdgeConv": (lambda: Deep(pyg.EdgeConv(mlp(2 * IN)), pyg.EdgeConv(mlp(2 * WIDTH))), ""),
    "by hand": (lambda: Plain(attention_by_hand), "attr"),
    "index_add": (lambda: Plain(index_add), "attr"),
    "segment": (lambda: Plain(segments), "attr"),
    **{
        f"scatter {name}": (lambda name=name: Plain(scatter_of(name)), "attr")
        for name in ("sum", "mean", "max", "min", "mul")
    },
    "edge scores": (lambda: Plain(edge_scores), "attr"),
    "distances": (lambda: Plain(distances), "attr"),
    "two SAGE": (lambda: Deep(pyg.SAGEConv(IN, WIDTH), pyg.SAGEConv(WIDTH, WIDTH)), ""),
    "two GAT": (lambda: Deep(pyg.GATConv(IN, 4, heads=2), pyg.GATConv(WIDTH, 4, heads=2)), ""),
    "two GCN": (lambda: Deep(pyg.GCNConv(IN, WIDTH), pyg.GCNConv(WIDTH, WIDTH)), ""),
    "two max": (lambda: Deep(pyg.SAGEConv(IN, WIDTH, aggr="max"), pyg.SAGEConv(WIDTH, WIDTH, aggr="max")), ""),
}

REPEATED = {  # what these try, others try, too
    *("SAGE min", "SAGE sum", "GATv2 1 head", "GATv2 shared", "MF", "LE", "SG", "FiLM", "two max", "two GCN"),
    *("PNA 1 towers", "PNA 2 towers", "PNA 3 towers", "PNA divided"),
    *("EdgeConv mean", "EdgeConv sum", "CGConv", "learned", "filtered", "decoder", "mesh", "PNA edges", "scatter min"),
}


def build(name, dtype=torch.float64, seed=0):
    """A layer, and what it takes beside features and edges."""
    torch.manual_seed(seed)
    make, takes = LAYERS[name]
    return make().to(dtype), takes


def graph(kind="random", nodes=23, edges=90, dtype=torch.float64, seed=0, takes=""):
    """Features with ties, edge_index of (2, edges), and weights or features of edges."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "one node":
        nodes, edges = 1, 3
    if kind == "no edges":
        edges = 0
    if kind == "as many edges as nodes":
        edges = nodes
    x = torch.randn(nodes, FEATURES, generator=generator, dtype=dtype)
    if kind == "ties":
        x = x.round()
        x[1::2] = x[::2][: len(x[1::2])]
    edge_index = torch.randint(nodes, (2, edges), generator=generator)
    if kind == "isolated":
        edge_index = edge_index % 7
    if kind == "sorted":
        edge_index = edge_index[:, edge_index[1].argsort(stable=True)]
    if kind == "strided":
        edge_index = edge_index.t().contiguous().t()
    extra = {
        "": (),
        "weight": (torch.rand(edges, generator=generator, dtype=dtype) + 0.5,),
        "attr": (torch.randn(edges, EDGE, generator=generator, dtype=dtype),),
    }[takes]
    return x.requires_grad_(), edge_index, *(e.requires_grad_() for e in extra)


GRAPHS = ("random", "ties", "one node", "no edges", "as many edges as nodes", "isolated", "sorted", "strided")
