// A live page asks for its sections now and then, and replaces those that changed. What the reader did stays: the order
// of a table, what is open, where it is scrolled, what has the focus; a form that is being filled in is left alone.
const main = document.querySelector("main"), lost = document.getElementById("lost"), shown = new Map();
const sort = (section) => sortTables({
  querySelectorAll: (what) => section.querySelectorAll(what),
  createElement: (name) => document.createElement(name),
});
const scrolling = (section) => [...section.querySelectorAll(".wide, pre")];
const focusable = (section) => [...section.querySelectorAll("a, button, summary, [tabindex]")];
const orders = (table) => [...table.querySelectorAll("th")].map((head) => head.getAttribute("aria-sort"));
const replace = (section, html) => {
  const open = [...section.querySelectorAll("details")].map((each) => each.open);
  const places = scrolling(section).map((each) => [each.scrollLeft, each.scrollTop]);
  const sorted = [...section.querySelectorAll("table")].map(orders);
  const focus = focusable(section).indexOf(document.activeElement);
  section.innerHTML = html;
  sort(section);
  section.querySelectorAll("details").forEach((each, place) => { each.open = open[place] ?? each.open; });
  section.querySelectorAll("table").forEach((table, place) => {
    const column = (sorted[place] ?? []).findIndex((order) => order !== null);
    const head = table.querySelectorAll("th")[column], button = head?.querySelector("button");
    for (let clicks = 0; button && clicks < 3; clicks += 1) {
      if (head.getAttribute("aria-sort") === sorted[place][column]) break;
      button.click();
    }
  });
  scrolling(section).forEach((each, place) => { [each.scrollLeft, each.scrollTop] = places[place] ?? [0, 0]; });
  if (focus >= 0) focusable(section)[focus]?.focus({ preventScroll: true });
};
const refresh = async () => {
  try {
    const asked = new URL(location.href);
    asked.searchParams.set("since", main.dataset.version);
    const answer = await fetch(asked);
    if (answer.status === 200) {
      const found = await answer.json();
      for (const [name, html] of Object.entries(found.sections)) {
        const section = document.getElementById(`part-${name}`);
        const edited = document.activeElement?.closest("form");
        if (!section || shown.get(name) === html || (edited && section.contains(edited))) continue;
        replace(section, html);
        shown.set(name, html);
      }
      main.dataset.version = found.version;
      main.dataset.seconds = found.seconds ?? "";
    }
    lost.hidden = answer.ok;
  } catch {
    lost.hidden = false;
  }
};
const wait = () => {
  const seconds = Number(main.dataset.seconds);
  if (seconds) setTimeout(async () => { if (!document.hidden) await refresh(); wait(); }, 1000 * seconds);
};
sort(document);
wait();
