"use strict";
(() => {
  const all = (root, selector) => Array.from(root.querySelectorAll(selector));
  document.documentElement.classList.add("scripted-on");

  // Tables: sort by a header, filter by a select, download what is shown.
  const keyOf = (cell) => {
    const key = cell.dataset.key;
    if (key === undefined) return null;
    const number = Number(key);
    return key !== "" && Number.isFinite(number) ? number : key;
  };
  const compare = (a, b) => {
    if (a === null || b === null) return a === b ? 0 : a === null ? 1 : -1;
    if (typeof a === "number" && typeof b === "number") return a - b;
    return String(a).localeCompare(String(b), "en", { numeric: true });
  };
  const sortBy = (table, header) => {
    const column = header.cellIndex;
    const up = header.getAttribute("aria-sort") !== "ascending";
    for (const other of header.parentNode.cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", up ? "ascending" : "descending");
    const body = table.tBodies[0];
    const rows = Array.from(body.rows, (row, place) => ({ row, place, key: keyOf(row.cells[column]) }));
    rows.sort((a, b) => {
      if (a.key === null || b.key === null) return compare(a.key, b.key) || a.place - b.place;
      return (up ? 1 : -1) * compare(a.key, b.key) || a.place - b.place;
    });
    body.append(...rows.map((item) => item.row));
  };
  const shownOf = (status, shown, total) => {
    if (status) status.textContent = shown === total ? "" : `${shown} of ${total}`;
  };
  const filterTable = (block) => {
    const wanted = all(block, "select[data-column]").filter((select) => select.value !== "");
    const rows = Array.from(block.querySelector("table").tBodies[0].rows);
    let shown = 0;
    for (const row of rows) {
      const fits = wanted.every(
        (select) => row.cells[Number(select.dataset.column)].dataset.key === select.value,
      );
      row.hidden = !fits;
      shown += fits ? 1 : 0;
    }
    shownOf(block.querySelector(".shown"), shown, rows.length);
  };
  // A spreadsheet would carry out a text that begins like a formula; numbers and their limits stay.
  const FORMULA = /^[=+\-@\t\r]/;
  const NUMBERS = /^[+-]?\d[\d\s.,%[\]+-]*(e[+-]?\d+)?$/i;
  const quoted = (text) => {
    const plain = text.replaceAll("\u2212", "-").replaceAll("\u2009", "").trim();
    const safe = FORMULA.test(plain) && !NUMBERS.test(plain) ? `'${plain}` : plain;
    return `"${safe.replaceAll('"', '""')}"`;
  };
  const save = (name, text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };
  for (const block of all(document, "details.table")) {
    const table = block.querySelector("table");
    for (const header of all(table, "th")) {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      button.append(...header.childNodes);
      header.append(button);
      button.addEventListener("click", () => sortBy(table, header));
    }
    for (const select of all(block, "select[data-column]")) {
      select.addEventListener("change", () => filterTable(block));
    }
    block.querySelector("[data-csv]").addEventListener("click", (event) => {
      event.preventDefault();
      const rows = Array.from(table.rows).filter((row) => !row.hidden);
      const lines = rows.map((row) => Array.from(row.cells, (cell) => quoted(cell.textContent)).join(","));
      save(event.target.dataset.csv, lines.join("\n") + "\n");
    });
  }

  // Answers: order, filter, search, and a page of them at a time.
  const PAGE = 20;
  for (const block of all(document, "details.examples")) {
    const list = block.querySelector(".list");
    const items = Array.from(list.children, (element) => ({
      element,
      gain: Number(element.dataset.gain),
      text: element.textContent.toLowerCase(),
    }));
    const orders = {
      change: (a, b) => Math.abs(b.gain) - Math.abs(a.gain),
      gained: (a, b) => b.gain - a.gain,
      lost: (a, b) => a.gain - b.gain,
    };
    const more = block.querySelector("[data-more]");
    let limit = PAGE;
    const update = () => {
      const query = block.querySelector("[data-search]").value.toLowerCase();
      const wanted = all(block, "select[data-filter]").filter((select) => select.value !== "");
      const fits = (item) =>
        item.text.includes(query) &&
        wanted.every((s) => item.element.dataset[s.dataset.filter].split(" ").includes(s.value));
      const found = items.filter(fits).sort(orders[block.querySelector("[data-order]").value]);
      list.append(...found.map((item) => item.element));
      for (const item of items) item.element.hidden = true;
      for (const item of found.slice(0, limit)) item.element.hidden = false;
      more.parentNode.hidden = found.length <= limit;
      shownOf(block.querySelector(".shown"), found.length, items.length);
    };
    for (const control of all(block, "select, input")) {
      control.addEventListener("input", () => { limit = PAGE; update(); });
    }
    more.addEventListener("click", () => { limit += PAGE; update(); });
    update();
  }

  // Charts: hovering a line shows the values of the nearest place, read from the figure's CSV.
  const parse = (text) => {
    const rows = [];
    for (const line of text.split("\n").slice(1)) {
      const cells = line.match(/("([^"]|"")*"|[^,]*)(,|$)/g);
      if (!line || !cells) continue;
      rows.push(cells.map((cell) => cell.replace(/,$/, "").replace(/^"|"$/g, "").replaceAll('""', '"')));
    }
    return rows;
  };
  const digits = (value) => Number(value).toPrecision(4).replace(/\.?0+$/, "").replace("-", "\u2212");
  for (const figure of all(document, "figure")) {
    let rows = null;
    for (const cell of all(figure, ".cell")) {
      const svg = cell.querySelector("svg");
      if (!svg.querySelector("polyline") || svg.querySelector(".point:not(:first-child)") ) continue;
      const [low, high, start, end] = svg.dataset.x.split(" ").map(Number);
      const box = document.createElement("div");
      box.className = "readout";
      box.hidden = true;
      cell.append(box);
      svg.addEventListener("pointermove", (event) => {
        rows ??= parse(decodeURIComponent(figure.querySelector("a.download").href.split(",").slice(1).join(",")));
        const bounds = svg.getBoundingClientRect();
        const pixel = ((event.clientX - bounds.left) / bounds.width) * svg.viewBox.baseVal.width;
        const wanted = low + ((pixel - start) / (end - start)) * (high - low);
        const own = rows.filter((row) => row[0] === svg.getAttribute("aria-label") && row[3] !== "");
        if (!own.length) return;
        const nearest = own.reduce((a, b) =>
          Math.abs(Number(b[2]) - wanted) < Math.abs(Number(a[2]) - wanted) ? b : a)[2];
        const lines = own.filter((row) => row[2] === nearest).map((row) => `${row[1]} ${digits(row[3])}`);
        box.textContent = `${digits(nearest)}: ${[...new Set(lines)].join(", ")}`;
        box.hidden = false;
        const left = Math.min(event.clientX - bounds.left + 12, bounds.width - box.offsetWidth);
        box.style.left = `${Math.max(0, left)}px`;
        box.style.top = `${event.clientY - bounds.top + 14}px`;
      });
      svg.addEventListener("pointerleave", () => { box.hidden = true; });
    }
  }

  // Print shows everything that is folded away, except answers of earlier rounds.
  window.addEventListener("beforeprint", () => {
    for (const block of all(document, "details.table")) block.open = true;
  });
})();
