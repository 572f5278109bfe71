"use strict";
for (const listing of document.querySelectorAll(".listing")) {
  const body = listing.querySelector("tbody"), find = listing.querySelector(".find");
  const search = find.querySelector("input"), status = find.querySelector("[role=status]");
  const rows = [...body.rows], selects = [...find.querySelectorAll("select")];
  const texts = rows.map(row => row.textContent.toLowerCase());
  const cell = {domain: ".domain", verdict: ".verdict-name"};
  const of = (row, select) => row.querySelector(cell[select.dataset.column]).textContent;
  const show = () => {
    const wanted = search.value.toLowerCase();
    let count = 0;
    rows.forEach((row, n) => {
      row.hidden = !texts[n].includes(wanted)
        || selects.some(select => select.value && of(row, select) !== select.value);
      count += !row.hidden;
    });
    status.textContent = `${count} of ${rows.length} rows`;
  };
  for (const select of selects) {
    for (const name of [...new Set(rows.map(row => of(row, select)))].sort()) {
      select.add(new Option(name, name));
    }
    select.addEventListener("change", show);
  }
  search.addEventListener("input", show);
  const key = (row, n) => {
    const value = row.cells[n].dataset.v;
    return value === undefined ? row.cells[n].textContent : value === "" ? null : Number(value);
  };
  const heads = [...listing.querySelectorAll("thead th")];
  heads.forEach((head, n) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      body.append(...rows.map(row => [key(row, n), row]).sort(([a], [b]) => {
        if (a === null || b === null) return (a === null) - (b === null);
        const order = typeof a === "number" ? a - b : a.localeCompare(b, undefined, {numeric: true});
        return up ? order : -order;
      }).map(([, row]) => row));
    });
  });
  find.hidden = false;
  show();
}
