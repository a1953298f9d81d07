"""Tables and pictures of what ``run.py`` measured."""

from __future__ import annotations

import json
import pathlib

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

MARKERS = 'o', 's', '^', 'D', 'v', 'P', 'X', '*'
# The width of the README's column, in pixels.
WIDTH, DPI = 900, 100


def save(path: pathlib.Path, report: dict, figure: Figure) -> None:
    """Report and picture, each written beside, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + '.part')
    figure.savefig(scratch, format='png', dpi=2 * DPI)
    scratch.replace(path.with_name(path.name + '.png'))
    scratch.write_text(json.dumps(report, indent=1) + '\n')
    scratch.replace(path.with_name(path.name + '.json'))
    print(f'written: {path}.json, {path}.png')


def table(rows: list[dict]) -> str:
    """The rows of one case and pass: a line a contestant, columns by threads."""
    numbers = {}
    for row in rows:
        numbers.setdefault(row['contestant'], {})[row['threads']] = row
    threads = sorted({row['threads'] for row in rows})
    head = f'{"wall ms":>9} {"CPU ms":>9} {"x ours":>6} {"MiB":>6}'
    lines = [
        ' ' * 26 + ' |'.join(f'{f"threads: {t}":^33}' for t in threads),
        ' ' * 26 + ' |'.join(head for _ in threads) + '     error',
    ]
    for name, of_threads in numbers.items():
        cells = []
        for row in of_threads.values():
            if 'reason' in row:
                cells.append(f'{row["reason"][:33]:>33}')
                continue
            ratio, peak = (
                ' ' * 6 if row[key] is None else f'{row[key]:6.{digits}f}'
                for key, digits in (('cpu_ratio', 2), ('peak_mib', 1))
            )
            cells.append(f'{row["wall_ms"]:9.2f} {row["cpu_ms"]:9.2f} {ratio} {peak}')
        errors = [row['error'] for row in of_threads.values() if row.get('error')]
        error = f'{max(errors):10.0e}' if errors else ''
        lines.append(f'{name:26}{" |".join(cells)}{error}')
    return '\n'.join(lines)


def thread_gains(rows: list[dict], name: str) -> str:
    """How many times less wall time the contestant takes with more threads."""
    wall = {
        row['threads']: row['wall_ms']
        for row in rows
        if row['contestant'] == name and 'wall_ms' in row
    }
    fewest, *more = sorted(wall) or [None]
    gains = ', '.join(f'{wall[fewest] / wall[t]:.2f} (threads: {t})' for t in more)
    return gains and f'{name}, wall time on {fewest} / on more threads: {gains}'


def blas_table(blas: dict) -> str:
    """A line for each contestant, number of threads and library of its process."""
    lines = ['BLAS and OpenMP of each process']
    for name, by_threads in blas.items():
        for threads, libraries in by_threads.items():
            start = f'{name:26}threads: {threads}'
            for entry in libraries or [{'library': 'none known'}]:
                keys = 'api', 'version', 'architecture', 'threads'
                details = (f'{key} {entry[key]}' for key in keys if entry.get(key))
                lines.append(f'{start}  {", ".join([entry["library"], *details])}')
    return '\n'.join(lines)


def picture(report: dict) -> Figure:
    """CPU time on the fewest threads, as a multiple of ours, a panel a pass."""
    threads = min(row['threads'] for row in report['rows'])
    rows = [row for row in report['rows'] if row['threads'] == threads]
    names = list(dict.fromkeys(row['contestant'] for row in rows))
    passes = list(dict.fromkeys(row['pass'] for row in rows))
    heights = {case: height for height, case in enumerate(report['cases'])}
    figure = Figure((WIDTH / DPI, 1.8 + 0.5 * len(heights)), layout='constrained')
    panels = figure.subplots(1, len(passes), squeeze=False)[0]
    for axes, pass_ in zip(panels, passes):
        labels = dict.fromkeys(heights)
        for name, marker in zip(names, MARKERS):
            timed = [
                row
                for row in rows
                if (row['contestant'], row['pass']) == (name, pass_)
                and row.get('cpu_ratio')
            ]
            if name == names[0]:
                labels.update(
                    (row['case'], f'{row["case"]}\n{row["cpu_ms"]:.3g} ms')
                    for row in timed
                )
            axes.plot(
                [row['cpu_ratio'] for row in timed],
                [heights[row['case']] for row in timed],
                marker,
                label=name,
            )
        axes.set_yticks(
            list(heights.values()),
            [label or case for case, label in labels.items()],
            fontsize=8,
        )
        axes.set_ylim(len(heights) - 0.5, -0.5)
        axes.grid(axis='y', color='0.9')
        axes.axvline(1, color='0.6', linewidth=0.8, zorder=0)
        axes.set_xscale('log')
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter('{x:g}')
        axes.xaxis.set_minor_locator(NullLocator())
        axes.tick_params('x', labelsize=8)
        axes.set_xlabel(f'CPU time, {names[0]} = 1 (right: slower)', fontsize=9)
        axes.set_title(pass_, fontsize=10)
    figure.suptitle(
        f'{report["machine"]["processor"]}, threads: {threads}, {report["date"]}. '
        f'Cases: n x c x out_c x side, milliseconds of {names[0]}',
        fontsize=9,
    )
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc='outside lower center', ncols=4, fontsize=8)
    return figure


def growth_table(rows: list[dict]) -> str:
    head = (
        f'{"":24} {"n":>3} {"side":>5} {"CPU ms":>9} {"ns a pixel":>10} '
        f'{"x least":>7} {"MiB beside":>10}'
    )
    lines = [head]
    for row in rows:
        label = f'{row["series"]}, {row["pass"]}'
        line = f'{label:24} {row["n"]:3} {row["side"]:5} '
        if 'reason' in row:
            lines.append(line + row['reason'])
            continue
        beside = row['beside_mib']
        lines.append(
            f'{line}{row["cpu_ms"]:9.2f} {row["ns_a_pixel"]:10.0f} {row["ratio"]:7.2f} '
            + ('' if beside is None else f'{beside:10.1f}')
        )
    return '\n'.join(lines)


def growth_picture(report: dict) -> Figure:
    """Time per output pixel, and memory beside arguments and results, by pixels."""
    figure = Figure(figsize=(WIDTH / DPI, 4), layout='constrained')
    left, right = figure.subplots(1, 2)
    rows = [row for row in report['rows'] if 'reason' not in row]
    lines = dict.fromkeys((row['series'], row['pass']) for row in rows)
    for line, marker in zip(lines, MARKERS):
        of_line = [row for row in rows if (row['series'], row['pass']) == line]
        pixels = [row['n'] * row['side'] ** 2 for row in of_line]
        left.plot(pixels, [row['ratio'] for row in of_line], marker + '-', ms=4)
        right.plot(
            pixels,
            [row['beside_mib'] for row in of_line],
            marker + '-',
            ms=4,
            label=', '.join(line),
        )
    left.axhline(1.3, color='0.5', linewidth=0.8, linestyle=':')
    left.set_title('CPU time per output pixel, as a multiple of the least', fontsize=10)
    right.set_title('MiB beside arguments, output and gradients', fontsize=10)
    for axes in left, right:
        axes.set_xscale('log')
        axes.set_xlabel('output pixels, n * h * w')
        axes.set_ylim(bottom=0)
        axes.grid(color='0.9')
    figure.suptitle(
        f'{report["contestant"]}, {report["channels"]} channels in and out, '
        f'{report["machine"]["processor"]}, one thread, {report["date"]}',
        fontsize=10,
    )
    figure.legend(loc='outside lower center', ncols=4, fontsize=8)
    return figure
