// Images to judge. The first is the one on screen; those behind it are loaded and decoded already.

const SMALL_EDGE = 128; // pixels; smaller pictures are enlarged pixel by pixel instead of blurred
const TRIES = 6;

export class Deck {
  // `onReady(card)` is called when a picture can be shown, `onBroken(card)` when it cannot be had.
  constructor(onReady, onBroken) {
    this.onReady = onReady;
    this.onBroken = onBroken;
    this.cards = [];
  }

  get top() {
    return this.cards[0];
  }

  get isEmpty() {
    return this.cards.length === 0;
  }

  get items() {
    return this.cards.map((card) => card.item);
  }

  has(item) {
    return this.cards.some((card) => card.item === item);
  }

  // An offer, or a card that was here before.
  push(offer) {
    this.cards.push(this.load(offer));
  }

  putOnTop(offer) {
    this.cards.unshift(this.load(offer));
  }

  remove(item) {
    this.cards = this.cards.filter((card) => card.item !== item);
  }

  load(offer) {
    if (offer.picture) return offer;
    const card = { item: offer.item, prompt: offer.prompt, image: offer.image, picture: null, ratio: 1 };
    this.fetchPicture(card, TRIES);
    return card;
  }

  async fetchPicture(card, tries) {
    const picture = new Image();
    picture.alt = "The image to judge";
    picture.draggable = false;
    picture.src = card.image;
    try {
      await picture.decode();
    } catch {
      if (tries > 1) setTimeout(() => this.fetchPicture(card, tries - 1), 1000 * 2 ** (TRIES - tries));
      else this.onBroken(card);
      return;
    }
    const { naturalWidth: width, naturalHeight: height } = picture;
    card.ratio = width / height;
    picture.classList.toggle("small", Math.min(width, height) < SMALL_EDGE);
    card.picture = picture;
    this.onReady(card);
  }
}
