"use strict";
// What a page can do beyond being read: choose among tabs, sort a table, keep the rows with some words.
for (const [number, box] of document.querySelectorAll(".tabs").entries()) {
  const parts = [...box.children];
  const choice = document.createElement("fieldset");
  choice.className = "choice";
  const legend = document.createElement("legend");
  legend.textContent = box.dataset.name;
  choice.append(legend);
  const show = (chosen) => { for (const part of parts) part.hidden = part !== chosen; };
  for (const part of parts) {
    const input = document.createElement("input");
    input.type = "radio";
    input.name = "tabs-" + number;
    input.checked = part === parts[0];
    input.addEventListener("change", () => show(part));
    const label = document.createElement("label");
    label.append(input, part.dataset.label);
    choice.append(label);
  }
  box.before(choice);
  box.classList.add("chosen");
  show(parts[0]);
}
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  const value = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.v === undefined ? cell.textContent : Number(cell.dataset.v);
  };
  const compare = (a, b) => typeof a === "number" && typeof b === "number"
    ? (a === b ? 0 : a < b ? -1 : 1)
    : String(a).localeCompare(String(b), undefined, { numeric: true });
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const up = heading.getAttribute("aria-sort") !== "ascending";
      for (const other of headings) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...body.rows].map((row) => [value(row, column), row]);
      rows.sort(([a], [b]) => (up ? compare(a, b) : compare(b, a)));
      body.append(...rows.map(([, row]) => row));
    });
  });
  if (body.rows.length > 8) {
    const filter = document.createElement("input");
    filter.type = "search";
    filter.className = "filter";
    filter.placeholder = "rows with these words, e.g. converged";
    filter.setAttribute("aria-label", "Show only the rows of the table that hold these words");
    filter.addEventListener("input", () => {
      const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const row of body.rows) {
        const text = [...row.cells].map((cell) => cell.textContent.toLowerCase()).join(" ");
        row.hidden = !words.every((word) => text.includes(word));
      }
    });
    table.parentElement.before(filter);
  }
}
