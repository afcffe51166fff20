"""Tables of text with aligned columns."""

WIDTH = 120                         # of a line, where single spaces between the columns achieve it


def format_table(rows, left=1, markdown=False):
    """Lines of a table.

    rows: lists of str of one length, the first one is the header; left: the number of columns,
    from the first one on, that are aligned to the left. The others, numbers, are aligned to the
    right. markdown: with | between the columns and a rule below the header.
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [[cell.ljust(width) if i < left else cell.rjust(width)
              for i, (cell, width) in enumerate(zip(row, widths))] for row in rows]
    if markdown:
        lines.insert(1, ['-' * width for width in widths])
        return [f'| {" | ".join(cells)} |' for cells in lines]
    gap = '  ' if sum(widths) + 2 * len(widths) - 2 <= WIDTH else ' '
    return [gap.join(cells).rstrip() for cells in lines]
