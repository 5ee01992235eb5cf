// Headers become buttons that sort their table: the larger first for numbers, then reversed, then as it was.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  if (rows.length < 3) continue;
  heads.forEach((head, column) => {
    const isNumber = head.classList.contains("number"), order = isNumber ? ["descending", "ascending"] : ["ascending", "descending"];
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    const value = (row) => {
      const cell = row.cells[column];
      return isNumber ? Number(cell.dataset.value ?? NaN) : cell.textContent;
    };
    const compare = (sign) => (one, other) => {
      const a = value(one), b = value(other);
      if (!isNumber) return sign * a.localeCompare(b, undefined, { numeric: true });
      if (isNaN(a) || isNaN(b)) return isNaN(a) - isNaN(b); // what has no number stays at the end
      return sign * (a - b);
    };
    button.addEventListener("click", () => {
      const next = [...order, null][order.indexOf(head.getAttribute("aria-sort")) + 1];
      for (const each of heads) each.removeAttribute("aria-sort");
      if (next) head.setAttribute("aria-sort", next);
      body.append(...(next ? [...rows].sort(compare(next === "ascending" ? 1 : -1)) : rows));
    });
  });
}
