// The viewer: slices by NiiVue, their position and window.
"use strict";

const PLANES = ["axial", "coronal", "sagittal"]; // NiiVue's slice types 0, 1 and 2; 3 shows all of them
const ALONG = [2, 1, 0]; // the axis of voxels that leads through the slices of a plane

async function draw(url) {
  if (!page.viewer) {
    page.viewer = new niivue.Niivue({
      isRadiologicalConvention: true, // the patient's right is on the left
      sagittalNoseLeft: true, // as in report.html
      backColor: [0, 0, 0, 1],
      crosshairColor: [1, 0.85, 0, 0.6],
      crosshairWidth: 1,
      crosshairWidthUnit: "mm",
      show3Dcrosshair: false,
      multiplanarShowRender: niivue.SHOW_RENDER ? niivue.SHOW_RENDER.NEVER : 0,
      dragAndDropEnabled: false,
      isColorbar: false,
      showAllOrientationMarkers: true,
      fontColor: [0.9, 0.9, 0.9, 1],
      fontMinPx: 15,
      heroSliceType: 0,
      dragMode: niivue.DRAG_MODE.windowing, // by the right button
      logLevel: "error",
    });
    await page.viewer.attachToCanvas($("canvas"));
    page.viewer.onLocationChange = showPosition;
    page.viewer.onIntensityChange = showWindow;
    const drawScene = page.viewer.drawScene.bind(page.viewer);
    page.viewer.drawScene = () => {
      drawScene();
      if (page.viewer.volumes.length) drawMeasurements();
    };
    $("canvas").addEventListener("mousemove", hover);
    $("canvas").addEventListener("keydown", press, true);
  }
  const viewer = page.viewer;
  if (viewer.drawBitmap) viewer.closeDrawing();
  const [low, high] = page.model.windows[$("window").value] || page.model.windows["soft tissue"];
  await viewer.loadVolumes([{ url, name: "scan.nii", colormap: "gray", cal_min: low, cal_max: high }]);
  viewer.scene.crosshairPos = [0.5, 0.5, 0.5];
  setView();
  showWindow();
}

function setView() {
  const large = $("view").value === "4"; // the axial plane, the others beside it
  page.viewer.opts.heroImageFraction = large ? 0.62 : 0;
  page.viewer.opts.multiplanarPadPixels = large ? 0 : 24; // for the letters of the sides
  page.viewer.setSliceType(Math.min(3, Number($("view").value)));
  showPosition();
}

function setWindow() {
  const levels = page.model.windows[$("window").value];
  if (levels) applyWindow(...levels);
}

function applyWindow(low, high) {
  const volume = page.viewer && page.viewer.volumes[0];
  if (!volume || !(low < high)) return;
  [volume.cal_min, volume.cal_max] = [low, high];
  page.viewer.updateGLVolume();
  showWindow();
}

function showWindow() {
  // Level and width as they are, and the preset that they belong to.
  const { cal_min: low, cal_max: high } = page.viewer.volumes[0];
  [$("level").value, $("width").value] = [Math.round((low + high) / 2), Math.round(high - low)];
  const preset = Object.entries(page.model.windows).find(([, levels]) => levels[0] === low && levels[1] === high);
  $("window").value = preset ? preset[0] : "";
}

// --- the position

function plane() {
  const type = Number($("view").value);
  return type < PLANES.length ? type : 0; // of three planes, the slider moves the axial one
}

function slices() {
  // How many slices the plane has, and which one is shown, from 0.
  const axis = ALONG[plane()];
  return [page.viewer.volumes[0].dimsRAS[axis + 1], page.viewer.frac2vox(page.viewer.scene.crosshairPos)[axis]];
}

function goToSlice(index) {
  const [count, current] = slices();
  const step = [0, 0, 0];
  step[ALONG[plane()]] = Math.min(count - 1, Math.max(0, index)) - current;
  page.viewer.moveCrosshairInVox(...step);
}

function words(mm) {
  // RAS mm as a reader says it: the viewer counts to the right and to the front.
  return [["R", "L"], ["A", "P"], ["F", "H"]].map(([less, more], axis) => {
    const number = axis === 2 ? mm[2] : -mm[axis];
    return `${Math.abs(number).toFixed(0)} ${number < 0 ? less : more}`;
  }).join(", ");
}

function valueAt(fraction) {
  const voxel = page.viewer.frac2vox(fraction);
  return Math.round(page.viewer.volumes[0].getValue(voxel[0], voxel[1], voxel[2]));
}

let spoken;
function showPosition() {
  const viewer = page.viewer;
  if (!viewer.volumes.length) return;
  const cross = viewer.scene.crosshairPos;
  const [count, index] = slices();
  const slider = $("slice");
  [slider.min, slider.max, slider.value] = [1, count, index + 1];
  const shown = `${index + 1} / ${count}`;
  $("slice-number").textContent = shown;
  slider.setAttribute("aria-valuetext", `${PLANES[plane()]} slice ${index + 1} of ${count}`);
  const text = `${valueAt(cross)} HU at ${words(viewer.frac2mm(cross))} mm`;
  $("cross").textContent = `Cross: ${text}`;
  clearTimeout(spoken); // a screen reader hears where a movement ends, not each step
  spoken = setTimeout(() => ($("position").textContent = `${PLANES[plane()]} slice ${index + 1} of ${count}, ${text}`), 500);
}

function hover(event) {
  if (!page.viewer.volumes.length) return;
  const found = pointAt(event);
  $("hover").textContent = found ? `${valueAt(found.fraction)} HU at ${words(found.mm)} mm` : "–";
}

function press(event) {
  if (event.ctrlKey || event.altKey || event.metaKey || !page.viewer.volumes.length) return;
  const [count, index] = slices();
  const targets = {
    ArrowUp: index + 1, ArrowRight: index + 1, ArrowDown: index - 1, ArrowLeft: index - 1,
    PageUp: index + 10, PageDown: index - 10, Home: 0, End: count - 1,
  };
  if (event.key in targets) goToSlice(targets[event.key]);
  else if (!preset(event)) return;
  event.preventDefault();
  event.stopImmediatePropagation(); // NiiVue has other uses for the arrow keys
}

function preset(event) {
  const name = Object.keys(page.model.windows)[Number(event.key) - 1];
  if (!name || !/^[1-5]$/.test(event.key)) return false;
  $("window").value = name;
  setWindow();
  return true;
}

function startViewer() {
  for (const name of Object.keys(page.model.windows)) $("window").append(make("option", name, { value: name }));
  $("window").append(make("option", "own", { value: "" }));
  $("window").value = "soft tissue";
  $("view").addEventListener("change", setView);
  $("window").addEventListener("change", setWindow);
  for (const id of ["level", "width"]) {
    $(id).addEventListener("change", () => {
      const [level, width] = [Number($("level").value), Number($("width").value)];
      applyWindow(level - width / 2, level + width / 2);
    });
  }
  $("slice").addEventListener("input", () => goToSlice(Number($("slice").value) - 1));
  $("slice").addEventListener("keydown", preset);
}
