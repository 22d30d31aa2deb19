"use strict";

// Tables: a heading's button sorts by the cells' data-value; cells without one stay last.
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const body = table.tBodies[0];
  for (const button of table.querySelectorAll("thead button")) {
    button.addEventListener("click", () => {
      const heading = button.closest("th");
      const column = heading.cellIndex;
      const now = heading.getAttribute("aria-sort");
      const order = now ? (now === "ascending" ? "descending" : "ascending") : button.dataset.first;
      for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const value = (row) => row.cells[column].dataset.value;
      const rows = [...body.rows].sort((first, second) => {
        const [a, b] = [value(first), value(second)];
        if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
        const numbers = a !== "" && b !== "" && !isNaN(a) && !isNaN(b);
        return sign * (numbers ? a - b : a.localeCompare(b));
      });
      body.append(...rows);
      const top = Number(table.dataset.top);
      if (top) rows.forEach((row, n) => row.classList.toggle("more", n >= top && !("papers" in row.dataset)));
    });
  }
}

// Long tables begin with their leaders.
for (const more of document.querySelectorAll("button.all")) {
  const section = more.closest("section");
  const table = section.querySelector("table.board");
  table.classList.add("short");
  more.hidden = false;
  const text = more.textContent;
  more.addEventListener("click", () => {
    const short = table.classList.toggle("short");
    more.setAttribute("aria-expanded", String(!short));
    more.textContent = short ? text : "Show the leaders";
  });
}

// Strips of pictures say that they scroll, as long as there is something to scroll to.
for (const reel of document.querySelectorAll(".reel")) {
  const cue = reel.parentElement.querySelector(".cue");
  const tell = () => {
    const left = reel.scrollWidth - reel.clientWidth - reel.scrollLeft;
    cue.hidden = reel.scrollWidth <= reel.clientWidth + 1;
    reel.classList.toggle("goes-on", left > 1);
  };
  reel.addEventListener("scroll", tell);
  addEventListener("resize", tell);
  tell();
}

// The theme follows the system until the button says otherwise.
const button = document.getElementById("theme");
const system = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
const name = () => { button.textContent = isDark() ? "Light" : "Dark"; };
button.addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  name();
});
system.addEventListener("change", name);
name();
button.hidden = false;

// Paper cannot be unfolded, and a link into a folded part must open it.
const closed = new Set();
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details:not([open])")) { closed.add(part); part.open = true; }
});
addEventListener("afterprint", () => { for (const part of closed) part.open = false; closed.clear(); });
const unfold = () => {
  const target = document.getElementById(location.hash.slice(1));
  if (target && target.tagName === "DETAILS") target.open = true;
};
addEventListener("hashchange", unfold);
unfold();
