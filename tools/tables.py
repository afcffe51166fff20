"""Text tables with aligned columns."""

WIDTH = 120                         # characters; wider tables have single spaces between columns


def format_table(rows, left=1, markdown=False):
    """Return the lines of a table as a list of str.

    rows: lists of str of equal length, header first; left: the first `left` columns are aligned
    left, the others right; markdown: make a Markdown table.
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [[cell.ljust(width) if i < left else cell.rjust(width)
              for i, (cell, width) in enumerate(zip(row, widths))] for row in rows]
    if markdown:
        lines.insert(1, ['-' * width for width in widths])
        return [f'| {" | ".join(cells)} |' for cells in lines]
    gap = '  ' if sum(widths) + 2 * len(widths) - 2 <= WIDTH else ' '
    return [gap.join(cells).rstrip() for cells in lines]
