package main

import (
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"time"
)

// nobody is a client that does not look at what it is answered.
type nobody struct{ header http.Header }

func (n nobody) Header() http.Header         { return n.header }
func (n nobody) Write(p []byte) (int, error) { return len(p), nil }
func (n nobody) WriteHeader(int)             {}

// floor answers constant bytes, as the cheapest handler of net/http does.
func floor(size int) http.Handler {
	body := []byte(strings.Repeat("x", size))
	mux := http.NewServeMux()
	mux.HandleFunc("GET /wechat/checklogin", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.Write(body)
	})
	return mux
}

func quietServer(b *testing.B, tickets int) (*server, []string) {
	c, err := parseConfig(nil, with("MAX_TICKETS=2000000", "TICKET_TTL=24h", "QR_RATE=0", "LOG_LEVEL=error"), io.Discard)
	must(b, err)
	s := newServer(c, slog.New(slog.DiscardHandler))
	secrets := make([]string, tickets)
	for i := range secrets {
		secrets[i] = "ticket" + strconv.Itoa(i)
		must(b, s.tickets.begin(secrets[i], "http://weixin.qq.com/q/02abcdefghijklmnop", nil))
	}
	return s, secrets
}

func serveAll(b *testing.B, h http.Handler, requests []*http.Request) {
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		h.ServeHTTP(nobody{make(http.Header, 8)}, requests[i%len(requests)])
		i++
	}
}

// BenchmarkPoll is a poll without wait, through all of the server's handlers.
func BenchmarkPoll(b *testing.B) {
	for _, tickets := range []int{10, 1000, 100_000, 1_000_000} {
		s, secrets := quietServer(b, tickets)
		requests := make([]*http.Request, 1000)
		for i := range requests {
			requests[i] = httptest.NewRequest("GET", "/wechat/checklogin?ticket="+secrets[i*7919%tickets], nil)
		}
		b.Run(fmt.Sprintf("tickets=%d", tickets), func(b *testing.B) { serveAll(b, s.routes(), requests) })
		b.Run(fmt.Sprintf("tickets=%d/floor", tickets), func(b *testing.B) { serveAll(b, floor(56), requests) })
	}
}

// BenchmarkPush is a signed SCAN that completes a ticket.
func BenchmarkPush(b *testing.B) {
	s, _ := quietServer(b, 0)
	handler := s.routes()
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		b.StopTimer()
		ticket := "push" + strconv.Itoa(i)
		must(b, s.tickets.begin(ticket, "x", nil))
		timestamp, nonce := strconv.FormatInt(time.Now().Unix(), 10), strconv.Itoa(i)
		query := url.Values{"timestamp": {timestamp}, "nonce": {nonce}, "signature": {signature(s.config.token, timestamp, nonce)}}
		r := httptest.NewRequest("POST", "/wechat/message?"+query.Encode(), strings.NewReader(pushXML("openid", "SCAN", "scene", ticket)))
		i++
		b.StartTimer()
		handler.ServeHTTP(nobody{make(http.Header, 8)}, r)
	}
}

// BenchmarkAuthQR is a new ticket of flow B, and its picture.
func BenchmarkAuthQR(b *testing.B) {
	s, _ := quietServer(b, 0)
	handler := s.routes()
	b.ReportAllocs()
	for b.Loop() {
		out := httptest.NewRecorder()
		handler.ServeHTTP(out, httptest.NewRequest("GET", "/wechat/getauthqr", nil))
		ticket := out.Body.String()[len(`{"ticket":"`):][:26]
		handler.ServeHTTP(nobody{make(http.Header, 8)}, httptest.NewRequest("GET", "/wechat/qr.png?ticket="+ticket, nil))
	}
}

func BenchmarkSignature(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		verify(docSignature, docToken, "1714036504", "1514711492")
	}
}

func BenchmarkSession(b *testing.B) {
	s := testSigner(secretA)
	token, err := s.sign(login{OpenID: "openid"}, time.Now(), "id")
	must(b, err)
	b.ReportAllocs()
	for b.Loop() {
		s.verify(token)
	}
}

// BenchmarkStore begins a ticket among many.
func BenchmarkStore(b *testing.B) {
	for _, tickets := range []int{1000, 100_000, 1_000_000} {
		s, _ := quietServer(b, tickets)
		b.Run(fmt.Sprintf("begin/tickets=%d", tickets), func(b *testing.B) {
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				if s.tickets.begin(b.Name()+strconv.Itoa(i), "x", nil) != nil {
					b.Fatal("full")
				}
				i++
			}
		})
	}
}
