/** Grafana's colour names and scales, for dark and light. */

const SHADES = {
  green: ["#37872D", "#56A64B", "#73BF69", "#96D98D", "#C8F2C2"],
  yellow: ["#E0B400", "#F2CC0C", "#FADE2A", "#FFEE52", "#FFF899"],
  red: ["#C4162A", "#E02F44", "#F2495C", "#FF7383", "#FFA6B0"],
  blue: ["#1F60C4", "#3274D9", "#5794F2", "#8AB8FF", "#C0D8FF"],
  orange: ["#FA6400", "#FF780A", "#FF9830", "#FFB357", "#FFCB7D"],
  purple: ["#8F3BB8", "#A352CC", "#B877D9", "#CA95E5", "#DEB6F2"],
};
const PREFIXES = ["dark-", "semi-dark-", "", "light-", "super-light-"];
const NAMED = Object.fromEntries(
  Object.entries(SHADES).flatMap(([hue, shades]) => shades.map((shade, at) => [PREFIXES[at] + hue, shade])),
);
/** What can be read as text on white: one dark shade for each hue. */
const INKS = {
  green: "#2F7526",
  yellow: "#8A6D00",
  red: "#C4162A",
  blue: "#1F60C4",
  orange: "#B34700",
  purple: "#8F3BB8",
};
const ON_WHITE = Object.fromEntries(
  Object.entries(INKS).flatMap(([hue, shade]) => PREFIXES.map((each) => [each + hue, shade])),
);

const CLASSIC = `
  #73BF69 #F2CC0C #8AB8FF #FF780A #F2495C #5794F2 #B877D9 #705DA0 #37872D #FADE2A
  #447EBC #C15C17 #890F02 #0A437C #6D1F62 #584477 #B7DBAB #F4D598 #70DBED #F9BA8F
  #F29191 #82B5D8 #E5A8E2 #AEA2E0 #629E51 #E5AC0E #64B0C8 #E0752D #BF1B00 #0A50A1
  #962D82 #614D93 #9AC48A #F2C96D #65C5DB #F9934E #EA6460 #5195CE #D683CE #806EB7`
  .trim()
  .split(/\s+/);
/** The same places, as far as the pale ones would vanish on white. */
const CLASSIC_ON_WHITE = { "#F2CC0C": "#CFA600", "#8AB8FF": "#4E8FE8", "#FADE2A": "#D6B600", "#73BF69": "#4FA244" };

const SCALES = {
  "continuous-GrYlRd": ["#73BF69", "#FADE2A", "#F2495C"],
  "continuous-RdYlGr": ["#F2495C", "#FADE2A", "#73BF69"],
  "continuous-BlYlRd": ["#5794F2", "#FADE2A", "#F2495C"],
  "continuous-YlRd": ["#FADE2A", "#F2495C"],
  "continuous-BlPu": ["#5794F2", "#B877D9"],
  "continuous-YlBl": ["#FADE2A", "#5794F2"],
  "continuous-blues": ["#1F2B46", "#8AB8FF"],
  "continuous-reds": ["#3E1B22", "#FF7383"],
  "continuous-greens": ["#1B3320", "#96D98D"],
};
const HEAT = {
  Oranges: ["#3b1f04", "#a63603", "#f16913", "#fdae6b", "#fee6ce"],
  Blues: ["#06204a", "#08519c", "#4292c6", "#9ecae1", "#deebf7"],
  Greens: ["#00270f", "#006d2c", "#41ab5d", "#a1d99b", "#e5f5e0"],
  Reds: ["#3f0510", "#a50f15", "#ef3b2c", "#fc9272", "#fee0d2"],
  Purples: ["#24064f", "#54278f", "#807dba", "#bcbddc", "#efedf5"],
  Spectral: ["#5e4fa2", "#3288bd", "#abdda4", "#fee08b", "#f46d43", "#9e0142"],
  Turbo: ["#30123b", "#4675ed", "#1bcfd4", "#61fc6c", "#eecf3a", "#fb7e21", "#7a0403"],
  Viridis: ["#440154", "#3b528b", "#21918c", "#5ec962", "#fde725"],
};

export const dark = () => matchMedia("(prefers-color-scheme: dark)").matches;

/** The colour of the page's text, lines, ... as CSS has it now. */
export const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** A colour as a canvas takes it: a name of Grafana's, or any of CSS's. */
export function colour(name) {
  if (name === "text") return css("text");
  return NAMED[name] ?? (name || css("text"));
}

/** The same, to write with. */
export const ink = (name) => (dark() ? colour(name) : (ON_WHITE[name] ?? colour(name)));

/** The colour of the n-th series. */
export function classic(at) {
  const found = CLASSIC[at % CLASSIC.length];
  return dark() ? found : (CLASSIC_ON_WHITE[found] ?? found);
}

/** A colour of a series by its name, the same on every panel. */
export const byName = (name) => classic([...name].reduce((sum, each) => (sum * 31 + each.charCodeAt(0)) >>> 0, 7));

export const isScale = (mode) => mode in SCALES;
export const scaled = (mode, share) => mix(SCALES[mode], share);

/** A heatmap's colours from few to many; on dark the few are dark, on light they are light. */
export function heat(scheme, share) {
  const colours = HEAT[scheme] ?? HEAT.Oranges;
  const straight = ["Spectral", "Turbo", "Viridis"].includes(scheme);
  return mix(colours, dark() || straight ? share : 1 - share);
}

/** @param {string[]} colours @param {number} share 0 to 1 */
function mix(colours, share) {
  const place = Math.min(1, Math.max(0, share || 0)) * (colours.length - 1);
  const at = Math.min(colours.length - 2, Math.floor(place));
  const [low, high] = [channels(colours[at]), channels(colours[at + 1])];
  return `rgb(${low.map((each, i) => Math.round(each + (high[i] - each) * (place - at))).join(" ")})`;
}

const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

/** A colour with an opacity, 0 to 1. */
export function faded(hex, opacity) {
  if (/^#[0-9a-f]{6}$/i.test(hex)) return `rgb(${channels(hex).join(" ")} / ${opacity})`;
  return hex.startsWith("rgb(") && !hex.includes("/") ? hex.replace(")", ` / ${opacity})`) : hex;
}

/** Black or white, whichever can be read on a colour. */
export function over(background) {
  const found = background.startsWith("#") ? channels(background) : (background.match(/\d+/g) ?? [0, 0, 0]).map(Number);
  return (found[0] * 299 + found[1] * 587 + found[2] * 114) / 1000 > 140 ? "#111217" : "#ffffff";
}
