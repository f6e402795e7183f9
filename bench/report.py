"""From runs to tables: medians, and ratios to the direct connection of the same round."""

import math
from statistics import median


def summarise(runs):
    """{(workload, clients, protocol): {contender: {tps, ratio, cpu_us_per_tx, rounds, errors}}}"""
    cells = {}
    for run in runs:
        cell = (run["workload"], run["clients"], run["protocol"])
        cells.setdefault(cell, {}).setdefault(run["contender"], {})[run["round"]] = run
    return {cell: {name: of_contender(rounds, by_name.get("direct", {})) for name, rounds in by_name.items()} for cell, by_name in cells.items()}


def of_contender(rounds, direct):
    good = {number: run for number, run in rounds.items() if "tps" in run}
    errors = [run["error"] for run in rounds.values() if "error" in run]
    # A noisy machine is as noisy for the direct run beside it: ratios are taken within a round.
    ratios = [run["tps"] / direct[number]["tps"] for number, run in good.items() if "tps" in direct.get(number, {})]
    cpu = [run["cpu_us_per_tx"] for run in good.values() if run["cpu_us_per_tx"] is not None]
    return {
        "tps": median(run["tps"] for run in good.values()) if good else None,
        "ratio": median(ratios) if ratios else None,
        "cpu_us_per_tx": median(cpu) if cpu else None,
        **{field: middle(run.get(field) for run in good.values()) for field in ("latency_ms", "p99_ms")},
        "cpu_us": {who: middle(run["cpu_us"].get(who) for run in good.values()) for who in ("client", "proxy", "old", "new")},
        "by_round": good,
        "rounds": len(good),
        "errors": errors,
    }


def middle(values):
    values = [value for value in values if value is not None]
    return median(values) if values else None


def tables(summary, names):
    """One table for each workload and protocol, as text."""
    text = []
    titles = {"select": "select-only", "tpcb": "TPC-B", "update": "simple-update"}
    for workload, protocol in sorted({(workload, protocol) for workload, _, protocol in summary}):
        sizes = sorted(clients for w, clients, p in summary if (w, p) == (workload, protocol))
        text.append(f"\n{titles[workload]}, {protocol} (direct = 1.00)")
        text.append(f"  {'':<22}" + "".join(f"{f'{clients} clients':>30}" for clients in sizes))
        for name in names:
            row = [cell(summary[(workload, clients, protocol)].get(name)) for clients in sizes]
            text.append(f"  {name:<22}" + "".join(f"{value:>30}" for value in row))
    return "\n".join(text)


def cell(value):
    if not value:
        return "-"
    if value["tps"] is None:
        return "failed"
    ratio = f"{value['ratio']:.2f}" if value["ratio"] is not None else "-"
    cpu = f" {value['cpu_us_per_tx']:4.0f} us" if value["cpu_us_per_tx"] is not None else ""
    mark = " !" if value["errors"] else ""
    return f"{ratio} {value['tps']:8.0f}/s{cpu}{mark}"


def who_works(summary, names):
    """Latencies and CPU by process in the cells of our own generator, a line each."""
    lines = []
    for key in sorted(key for key in summary if key[2] == "own"):
        for name in names:
            of = summary[key].get(name)
            if of and of["latency_ms"] is not None:
                cpu = "  ".join(f"{who} {us:5.0f}" for who, us in of["cpu_us"].items() if us is not None)
                lines.append(f"  {label(key):<14} {name:<22} {of['latency_ms']:8.2f} ms {of['p99_ms']:8.2f} ms   {cpu}")
    return lines


def pairs(summary, a, b, field, cells=lambda cell: True):
    """Of a and b in each cell where both have the field: {cell: median of a / b in the same round}."""
    found = {}
    for key, by_name in summary.items():
        if cells(key) and a in by_name and b in by_name:
            one, other = by_name[a]["by_round"], by_name[b]["by_round"]
            ratios = [one[number][field] / other[number][field] for number in one if number in other and one[number][field] and other[number][field]]
            if ratios:
                found[key] = median(ratios)
    return found


def mean(ratios):
    """Geometric."""
    return math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))


def label(key):
    return "{}/{}/{}".format(*key)


def aims(summary):
    """Each aim with what was reached, as lines of text; those without figures are left out."""
    lines = []

    def line(aim, ratios, at_least=True):
        if not ratios:
            return
        worst = min(ratios, key=ratios.get) if at_least else max(ratios, key=ratios.get)
        lines.append(f"  {aim:<66} {mean(ratios.values()):5.2f} over {len(ratios)} cells, worst {ratios[worst]:.2f} ({label(worst)})")

    tpcb = lambda protocol: lambda cell: cell[0] == "tpcb" and cell[2] == protocol and cell[1] >= 8
    old, dual = "crossfade old", "crossfade dual-write"
    line("old / PgBouncer, throughput: 1.00 over all, none under 0.95", pairs(summary, old, "pgbouncer", "tps"))
    line("old / PgBouncer, CPU of the proxy: at most 1.30", pairs(summary, old, "pgbouncer", "cpu_us_per_tx"), at_least=False)
    line("old / direct, select-only with 8 clients: 0.90", pairs(summary, old, "direct", "tps", lambda cell: cell[:2] == ("select", 8)))
    line("dual-write / Pgpool-II, TPC-B prepared from 8 clients: 3.00", pairs(summary, dual, "pgpool", "tps", tpcb("prepared")))
    line("dual-write / Pgpool-II, TPC-B simple from 8 clients: 2.00", pairs(summary, dual, "pgpool", "tps", tpcb("simple")))
    many = lambda cell: cell[0] == "tpcb" and cell[1] >= 8 and cell[2] != "own"
    line("dual-write / direct, TPC-B from 8 clients: 0.40, better 0.47", pairs(summary, dual, "direct", "tps", many))
    hand, down = "by hand", "crossfade mirror down"
    line("dual-write / by hand, throughput from 8 clients: 0.85", pairs(summary, dual, hand, "tps", lambda cell: cell[1] >= 8))
    line("dual-write / by hand, latency with 1 client: at most 1.30", pairs(summary, dual, hand, "latency_ms", lambda cell: cell[1] == 1), at_least=False)
    line("mirror down / old, throughput: 0.85", pairs(summary, down, old, "tps"))
    return lines


def memory(figures):
    lines = []
    for name, figure in figures.items():
        if "error" in figure:
            lines.append(f"  {name:<22} failed: {figure['error']}")
            continue
        lines.append(f"  {name:<22} {figure['per_connection_kib']:8.1f} KiB for an idle connection; {figure['with_kib'] / 1024:8.1f} MiB with {figure['connections']}")
    return lines
