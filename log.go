package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	stdlog "log"
	"log/slog"
	"time"
)

// newLog returns a log of the format text or json. A message or an
// error may have what a stranger has sent: 300 characters of it are enough.
func newLog(w io.Writer, level slog.Level, format string) *slog.Logger {
	options := &slog.HandlerOptions{Level: level, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == "err" || a.Key == slog.MessageKey {
			a.Value = slog.StringValue(fmt.Sprintf("%.300s", a.Value))
		}
		return a
	}}
	if format == "json" {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}

// errorLog returns what takes the lines of net/http.
func errorLog(log *slog.Logger) *stdlog.Logger {
	return slog.NewLogLogger(limited{log.Handler(), newLimiter(60)}, slog.LevelWarn)
}

// A limited handler passes on as many lines as its limiter allows. Strangers cause
// most lines of net/http, such as those of bad TLS handshakes.
type limited struct {
	slog.Handler
	logLimit *limiter
}

func (h limited) Handle(ctx context.Context, r slog.Record) error {
	if h.logLimit.pass(one("")) > 0 {
		return nil
	}
	return h.Handler.Handle(ctx, r)
}

// A lineWriter writes the lines of the log in a goroutine of its own: nobody's
// login waits for a terminal that is being scrolled, or a pipe that nobody reads.
type lineWriter struct {
	lines   chan []byte
	ended   chan struct{} // closed by end
	written chan struct{} // closed once nothing more is written
}

func newLineWriter(w io.Writer) *lineWriter {
	l := &lineWriter{make(chan []byte, 1000), make(chan struct{}), make(chan struct{})}
	go func() { // until end
		defer close(l.written)
		for {
			select {
			case line := <-l.lines:
				w.Write(line)
			case <-l.ended:
				for len(l.lines) > 0 {
					w.Write(<-l.lines)
				}
				return
			}
		}
	}()
	return l
}

// Write drops the line when too many wait already.
func (l *lineWriter) Write(line []byte) (int, error) {
	select {
	case l.lines <- bytes.Clone(line):
	default:
	}
	return len(line), nil
}

// end writes what waits, for a second at most.
func (l *lineWriter) end() {
	close(l.ended)
	select {
	case <-l.written:
	case <-time.After(time.Second):
	}
}
