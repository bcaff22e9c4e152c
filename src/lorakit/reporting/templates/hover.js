// Shows the numbers of the mark nearest to the pointer, or of the mark chosen with the arrow keys.
"use strict";
(() => {
  const tip = document.getElementById("tip");
  let shown = null;

  const hide = () => {
    shown?.classList.remove("on");
    shown = null;
    tip.hidden = true;
  };

  const show = (mark) => {
    if (mark === shown && !tip.hidden) return;
    hide();
    shown = mark;
    mark.classList.add("on");
    tip.textContent = mark.dataset.t;
    tip.hidden = false;
    const at = mark.getBoundingClientRect();
    const left = at.x + at.width / 2 - tip.offsetWidth / 2;
    const above = at.y - tip.offsetHeight - 8;
    tip.style.left = `${Math.max(8, Math.min(left, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${above > 8 ? above : at.bottom + 8}px`;
  };

  for (const svg of document.querySelectorAll("svg.chart")) {
    const marks = [...svg.querySelectorAll("[data-t]")];
    if (!marks.length) continue;
    const cells = marks[0].closest(".mark-rect") !== null;

    const centre = (mark) => {
      const at = mark.getBoundingClientRect();
      return [at.x + at.width / 2, at.y + at.height / 2];
    };

    const closest = (distanceOf, limit) => {
      let nearest = null;
      let least = limit;
      for (const mark of marks) {
        const distance = distanceOf(...centre(mark));
        if (distance < least) [nearest, least] = [mark, distance];
      }
      return nearest;
    };

    const nearestTo = (event) => {
      if (event.target.dataset?.t) return event.target;
      const [x, y] = [event.clientX, event.clientY];
      // A finger may miss a small cell.
      if (cells) return closest((a, b) => Math.hypot(a - x, b - y), 12);
      // Horizontal distance counts more: readers look for the value at an x.
      return closest((a, b) => Math.abs(a - x) + 0.3 * Math.abs(b - y), 60);
    };

    // The closest cell above (-1) or below (1) the chosen one, in its column.
    const rowsAway = (direction) => {
      const [x, y] = centre(shown);
      const below = (b) => (b - y) * direction;
      return closest((a, b) => (Math.abs(a - x) < 0.5 && below(b) > 0.5 ? below(b) : Infinity), Infinity);
    };

    const point = (event) => {
      const mark = nearestTo(event);
      if (mark) show(mark);
      else hide();
    };
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerdown", point);
    // A finger leaves as soon as it is lifted: its numbers stay until the next tap.
    svg.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      if (event.altKey || event.ctrlKey || event.metaKey) return; // Back, in browsers
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const rows = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") hide();
      if (cells && rows && marks.includes(shown)) {
        event.preventDefault();
        show(rowsAway(rows) ?? shown);
      }
      if (!step) return;
      event.preventDefault();
      const index = marks.includes(shown) ? marks.indexOf(shown) + step : Math.min(step, 0);
      show(marks.at(index % marks.length));
    });
  }
  addEventListener("pointerdown", (event) => event.target.closest("svg.chart") || hide());
  // The arrow keys go on from the chosen mark: focus scrolls a chart into view.
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
  addEventListener("beforeprint", () => {
    for (const part of document.querySelectorAll("details")) part.open = true;
  });
})();
